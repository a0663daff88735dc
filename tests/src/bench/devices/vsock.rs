//! Sockets between guest and host, beside a Unix socket pair.

use std::io::{Read, Write};
use std::num::Wrapping;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use devices::virtio::vsock::fake_guest::{FakeGuest, packet};
use devices::virtio::vsock::{Header, Op, PortPair, VsockReader, VsockWriter};

use crate::bench::figure::{Definition, Samples};

const PORT: u32 = 1234;
const MESSAGE_BYTES: u32 = 64;
const MESSAGE: usize = MESSAGE_BYTES as usize;
const ROUND_TRIPS: u32 = 500;
/// What Linux puts into one packet at the most.
const PACKET_BYTES: u32 = 64 << 10;
const PACKET: usize = PACKET_BYTES as usize;
const PACKETS: u32 = 256;
/// How much room the guest says that it has.
const ROOM: u32 = 1 << 20;
const BUFFERS: usize = 256;

const DEFINITIONS: [Definition; 5] = [
    Definition::time("bare-echo", "64 bytes there and back over a Unix socket pair", None),
    Definition::time("vsock-echo", "the same between a guest's driver and the host", Some("bare-echo")),
    Definition::time("bare-64k", "64 KiB over a Unix socket pair", None),
    Definition::time("vsock-to-host", "the same from a guest's driver to the host", Some("bare-64k")),
    Definition::time("vsock-to-guest", "the same from the host to a guest's driver", Some("bare-64k")),
];

pub fn definitions() -> Vec<Definition> {
    DEFINITIONS.to_vec()
}

pub fn round(samples: &mut Samples) -> anyhow::Result<()> {
    samples.time("bare-echo", bare_echo()? / ROUND_TRIPS);
    samples.time("vsock-echo", echo()? / ROUND_TRIPS);
    samples.time("bare-64k", bare_packets()? / PACKETS);
    samples.time("vsock-to-host", to_host()? / PACKETS);
    samples.time("vsock-to-guest", to_guest()? / PACKETS);
    Ok(())
}

fn bare_echo() -> anyhow::Result<Duration> {
    let (mut near, mut far) = UnixStream::pair()?;
    let echo = thread::spawn(move || -> std::io::Result<()> {
        let mut message = [0; MESSAGE];
        for _ in 0..ROUND_TRIPS {
            far.read_exact(&mut message)?;
            far.write_all(&message)?;
        }
        Ok(())
    });
    let (begin, mut message) = (Instant::now(), [7; MESSAGE]);
    for _ in 0..ROUND_TRIPS {
        near.write_all(&message)?;
        near.read_exact(&mut message)?;
    }
    let time = begin.elapsed();
    echo.join().expect("no panic")?;
    Ok(time)
}

fn bare_packets() -> anyhow::Result<Duration> {
    let (mut near, mut far) = UnixStream::pair()?;
    let reader = thread::spawn(move || -> std::io::Result<()> {
        let mut buffer = vec![0; PACKET];
        (0..PACKETS).try_for_each(|_| far.read_exact(&mut buffer))
    });
    let (begin, packet) = (Instant::now(), vec![7; PACKET]);
    for _ in 0..PACKETS {
        near.write_all(&packet)?;
    }
    reader.join().expect("no panic")?;
    Ok(begin.elapsed())
}

/// A guest with one connection, whose other end a thread serves.
struct Connected {
    guest: FakeGuest,
    pair: PortPair,
    sent: Wrapping<u32>,
    received: Wrapping<u32>,
    /// How much of what was received the host was told of.
    told: Wrapping<u32>,
    /// What the host has said last of its room, and of what it has taken.
    host: (u32, Wrapping<u32>),
    server: JoinHandle<()>,
}

impl Connected {
    fn new(serve: impl AsyncFnOnce(VsockReader, VsockWriter) + Send + 'static) -> anyhow::Result<Self> {
        let mut guest = FakeGuest::ready(BUFFERS);
        let host = guest.host.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let server = thread::spawn(move || {
            runtime.block_on(async move {
                let stream = host.connect(PORT).await.expect("the guest accepts");
                let (reader, writer) = stream.split();
                serve(reader, writer).await;
            });
        });
        let (request, _) = guest.receive_op(Op::Request);
        let pair = PortPair { guest: request.dst_port, host: request.src_port };
        guest.send(&Header { buf_alloc: ROOM, ..packet(pair, Op::Response) }, &[]);
        let host = (request.buf_alloc, Wrapping(request.fwd_cnt));
        let [sent, received, told] = [Wrapping(0); 3];
        Ok(Self { guest, pair, sent, received, told, host, server })
    }

    fn header(&self, op: Op) -> Header {
        Header { buf_alloc: ROOM, fwd_cnt: self.received.0, ..packet(self.pair, op) }
    }

    /// Sends bytes once the host has room for them.
    fn send(&mut self, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("a packet");
        while (self.sent - self.host.1).0 + length > self.host.0 {
            let packet = self.guest.receive();
            self.note(&packet);
        }
        self.guest.send(&self.header(Op::Rw), payload);
        self.sent += length;
        while let Some(packet) = self.guest.poll() {
            self.note(&packet);
        }
    }

    /// Receives a packet, which may have no bytes.
    fn receive(&mut self) {
        let packet = self.guest.receive();
        self.note(&packet);
        if (self.received - self.told).0 > ROOM / 2 {
            self.guest.send(&self.header(Op::CreditUpdate), &[]);
            self.told = self.received;
        }
    }

    fn note(&mut self, (header, payload): &(Header, Vec<u8>)) {
        self.host = (header.buf_alloc, Wrapping(header.fwd_cnt));
        self.received += u32::try_from(payload.len()).expect("a packet");
    }

    fn finish(self) -> anyhow::Result<()> {
        let Self { guest, server, .. } = self;
        ensure!(server.join().is_ok(), "the host's end failed");
        drop(guest);
        Ok(())
    }
}

fn echo() -> anyhow::Result<Duration> {
    let mut connected = Connected::new(async |mut reader: VsockReader, mut writer: VsockWriter| {
        let (mut message, mut left) = ([0; MESSAGE], ROUND_TRIPS as usize * MESSAGE);
        while left > 0 {
            let count = reader.read(&mut message).await.expect("the guest sends");
            writer.write_all(&message[..count]).await.expect("the guest receives");
            left -= count;
        }
        writer.flush().await.expect("the guest receives");
    })?;
    let (begin, message) = (Instant::now(), [7; MESSAGE]);
    for trip in 1..=ROUND_TRIPS {
        connected.send(&message);
        while connected.received.0 < trip * MESSAGE_BYTES {
            connected.receive();
        }
    }
    let time = begin.elapsed();
    connected.finish()?;
    Ok(time)
}

fn to_host() -> anyhow::Result<Duration> {
    let (done, all) = mpsc::channel();
    let mut connected = Connected::new(async move |mut reader: VsockReader, _writer: VsockWriter| {
        let (mut buffer, mut left) = (vec![0; PACKET], PACKETS as usize * PACKET);
        while left > 0 {
            left -= reader.read(&mut buffer).await.expect("the guest sends");
        }
        let _ = done.send(Instant::now());
    })?;
    let (begin, payload) = (Instant::now(), vec![7; PACKET]);
    (0..PACKETS).for_each(|_| connected.send(&payload));
    let end = all.recv().context("the host got all")?;
    connected.finish()?;
    Ok(end - begin)
}

fn to_guest() -> anyhow::Result<Duration> {
    let (go, begun) = mpsc::channel::<()>();
    let mut connected = Connected::new(async move |_reader: VsockReader, mut writer: VsockWriter| {
        let _ = begun.recv();
        let payload = vec![7; PACKET];
        for _ in 0..PACKETS {
            writer.write_all(&payload).await.expect("the guest receives");
        }
        writer.flush().await.expect("the guest receives");
    })?;
    let begin = Instant::now();
    drop(go);
    while connected.received.0 < PACKETS * PACKET_BYTES {
        connected.receive();
    }
    let time = begin.elapsed();
    connected.finish()?;
    Ok(time)
}
