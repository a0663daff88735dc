//! An RPC that does nothing, beside the same bytes on a bare socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use futures::FutureExt;
use futures::future::LocalBoxFuture;
use guest_client::{Host, Launched};

use super::figure::{Definition, Samples};
use super::{Group, Rounds, Setting, launched};

const SOCKET: &str = "socket";
const DIRECT: &str = "rpc-direct";
const PROXIED: &str = "rpc-proxied";

/// Round trips of each kind in one round.
const TRIPS: usize = 100;

/// About the size of an empty call.
const MESSAGE: [u8; 128] = [0x5a; 128];

pub(super) static GROUP: Group = Group {
    figures: &[
        Definition::time(SOCKET, "128 bytes and back on a Unix socket, from thread to thread", None),
        Definition::time(DIRECT, "stop call without a guest, which does nothing, → answer", Some(SOCKET)),
        Definition::time(PROXIED, "the same through guestd", Some(SOCKET)),
    ],
    open: |setting| async { Ok(Box::new(Trips::prepare(setting)?) as Box<dyn Rounds>) }.boxed_local(),
};

struct Trips {
    socket: UnixStream,
    host: Host,
}

impl Trips {
    fn prepare(setting: &Setting) -> anyhow::Result<Self> {
        let (socket, peer) = UnixStream::pair()?;
        // Ends with the socket.
        std::thread::spawn(move || echo(peer));
        Ok(Self { socket, host: setting.host.clone() })
    }

    async fn measure(&mut self, samples: &mut Samples) -> anyhow::Result<()> {
        for _ in 0..TRIPS {
            let begin = Instant::now();
            self.socket.write_all(&MESSAGE)?;
            self.socket.read_exact(&mut [0; MESSAGE.len()])?;
            samples.time(SOCKET, begin.elapsed());
        }
        let direct = launched(&self.host).await?;
        let Launched { lifecycle: proxied, exit: _, id } = self.host.launch_proxied("");
        id.await?;
        proxied.stop().await?;
        for (name, lifecycle) in [(DIRECT, &direct), (PROXIED, &proxied)] {
            for _ in 0..TRIPS {
                let begin = Instant::now();
                lifecycle.stop().await?;
                samples.time(name, begin.elapsed());
            }
        }
        Ok(())
    }
}

impl Rounds for Trips {
    fn round<'a>(&'a mut self, samples: &'a mut Samples) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        self.measure(samples).boxed_local()
    }
}

fn echo(mut peer: UnixStream) {
    let mut message = [0; MESSAGE.len()];
    while peer.read_exact(&mut message).and_then(|()| peer.write_all(&message)).is_ok() {}
}
