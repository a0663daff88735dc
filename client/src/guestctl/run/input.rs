//! The user's input on its way to the guest.
//!
//! A thread reads: a read of a terminal cannot be taken back, and must hinder neither the connection nor the end of the process.

use super::terminal::{self, Escape, Key, RawTerminal};
use guest_client::ByteStream;
use std::io::{self, Read};
use std::rc::Rc;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_local;

/// How much is read at once.
const READ: usize = 16 << 10;

/// How many reads of what is no terminal may wait for the guest.
const AHEAD: usize = 4;

/// The input, and the terminal's raw mode if it comes from one.
pub struct Input {
    left: Option<oneshot::Receiver<()>>,
    _terminal: Option<RawTerminal>,
    // The port was asked for with the output, which goes with it.
    _serial: Rc<ByteStream>,
}

impl Input {
    /// Starts to forward the standard input, unless none is wanted or it belongs to another job of the user's shell.
    pub fn start(serial: ByteStream, none: bool) -> io::Result<Self> {
        let serial = Rc::new(serial);
        let mut input = Self { left: None, _terminal: None, _serial: serial.clone() };
        if none {
            return Ok(input);
        }
        if !terminal::is_terminal() {
            from_file(serial)?;
        } else if let Some(raw) = RawTerminal::enter()? {
            input._terminal = Some(raw);
            input.left = Some(from_terminal(serial)?);
        }
        Ok(input)
    }

    /// Resolves when the user leaves.
    pub async fn left(&mut self) {
        if let Some(left) = &mut self.left {
            let was_told = left.await.is_ok();
            self.left = None;
            if was_told {
                return;
            }
        }
        std::future::pending().await
    }
}

/// What is no terminal is read at the guest's pace.
fn from_file(serial: Rc<ByteStream>) -> io::Result<()> {
    let (give, mut reads) = mpsc::channel(AHEAD);
    read_in_thread(move |bytes| give.blocking_send(bytes.to_vec()).is_ok())?;
    spawn_local(async move {
        while let Some(bytes) = reads.recv().await {
            if !forward(&serial, &bytes).await {
                return;
            }
        }
    });
    Ok(())
}

/// Keys are read at the user's pace: a guest that takes none must not keep its user from leaving.
fn from_terminal(serial: Rc<ByteStream>) -> io::Result<oneshot::Receiver<()>> {
    let (give, mut reads) = mpsc::unbounded_channel();
    let (leave, left) = oneshot::channel();
    let mut leave = Some(leave);
    let mut escape = Escape::default();
    read_in_thread(move |bytes| match escape.pass(bytes) {
        Key::Through(bytes) => give.send(bytes).is_ok(),
        Key::Leave => {
            // The command may be ending already.
            let _ = leave.take().map(|leave| leave.send(()));
            false
        }
    })?;
    spawn_local(async move {
        while let Some(bytes) = reads.recv().await {
            if !forward(&serial, &bytes).await {
                return;
            }
        }
    });
    Ok(left)
}

/// Reads the standard input to its end, or until `take` has had enough.
fn read_in_thread(mut take: impl FnMut(&[u8]) -> bool + Send + 'static) -> io::Result<()> {
    let read = move || {
        let mut buffer = vec![0; READ];
        let mut stdin = io::stdin().lock();
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) if take(&buffer[..count]) => {}
                Ok(_) => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The end of what can be read.
                Err(_) => return,
            }
        }
    };
    std::thread::Builder::new().name("input".into()).spawn(read).map(drop)
}

/// Sends what was read. A guest that takes no more has ended, or is about to; run's answer tells.
async fn forward(serial: &ByteStream, bytes: &[u8]) -> bool {
    serial.write(bytes).await.is_ok()
}
