//! Frames over a network device whose back end is a Unix socket pair, beside such a pair.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use devices::virtio::fake_driver::{FakeDriver, Segment};
use devices::virtio::net::{Net, NetBackend, NetSpec};
use devices::virtio::rate_limit::RateLimits;

use crate::bench::figure::{Definition, Samples};

/// So many frames of so many bytes.
#[derive(Clone, Copy)]
struct Load {
    frames: u32,
    bytes: usize,
}

const SMALL: Load = Load { frames: 4000, bytes: 64 };
const LARGE: Load = Load { frames: 4000, bytes: 1500 };
/// What a driver with segmentation offloads, or a large MTU, hands over at once.
const HUGE: Load = Load { frames: 500, bytes: 60 << 10 };
/// How many frames may be under way.
const DEPTH: usize = 128;
/// In front of each frame: for the driver (struct virtio_net_hdr_v1), and for the stream (its length).
const DRIVER_HEADER: usize = 12;
const STREAM_HEADER: usize = 4;
const RX: usize = 0;
const TX: usize = 1;
const RX_BYTES: u32 = 4096;

const DEFINITIONS: [Definition; 9] = [
    Definition::time("bare-frame-64", "a frame of 64 bytes over a Unix socket pair, a call each", None),
    Definition::time("net-tx-64", "the same from a guest's driver, 128 under way", Some("bare-frame-64")),
    Definition::time("net-rx-64", "the same to a guest's driver", Some("bare-frame-64")),
    Definition::time("bare-frame-1500", "a frame of 1,500 bytes over a Unix socket pair, a call each", None),
    Definition::time("net-tx-1500", "the same from a guest's driver, 128 under way", Some("bare-frame-1500")),
    Definition::time("net-rx-1500", "the same to a guest's driver", Some("bare-frame-1500")),
    Definition::time("bare-frame-60k", "a frame of 60 KiB over a Unix socket pair, a call each", None),
    Definition::time("net-tx-60k", "the same from a guest's driver, 128 under way", Some("bare-frame-60k")),
    Definition::time(
        "net-rx-60k",
        "the same to a guest's driver, into merged buffers of 4 KiB",
        Some("bare-frame-60k"),
    ),
];

pub fn definitions() -> Vec<Definition> {
    DEFINITIONS.to_vec()
}

pub fn round(samples: &mut Samples) -> anyhow::Result<()> {
    let names = [
        ("bare-frame-64", "net-tx-64", "net-rx-64", SMALL),
        ("bare-frame-1500", "net-tx-1500", "net-rx-1500", LARGE),
        ("bare-frame-60k", "net-tx-60k", "net-rx-60k", HUGE),
    ];
    for (bare, transmit, receive, load) in names {
        samples.time(bare, over_a_pair(load)? / load.frames);
        samples.time(transmit, Network::new()?.transmit(load)? / load.frames);
        samples.time(receive, Network::new()?.receive(load)? / load.frames);
    }
    Ok(())
}

/// A frame with its length before it.
fn framed(bytes: usize) -> Vec<u8> {
    let length = u32::try_from(bytes).expect("a frame").to_be_bytes();
    [&length[..], &vec![7; bytes]].concat()
}

fn write_frames(mut stream: &UnixStream, load: Load) -> std::io::Result<()> {
    let frame = framed(load.bytes);
    (0..load.frames).try_for_each(|_| stream.write_all(&frame))
}

/// Reads as many bytes as all frames have.
fn read_frames(mut stream: &UnixStream, load: Load) -> std::io::Result<()> {
    let all = load.frames as usize * (STREAM_HEADER + load.bytes);
    let (mut buffer, mut left) = (vec![0; 64 << 10], all);
    while left > 0 {
        match stream.read(&mut buffer)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            count => left -= count,
        }
    }
    Ok(())
}

fn over_a_pair(load: Load) -> anyhow::Result<Duration> {
    let (near, far) = UnixStream::pair()?;
    let reader = thread::spawn(move || read_frames(&far, load));
    let begin = Instant::now();
    write_frames(&near, load)?;
    reader.join().expect("no panic")?;
    Ok(begin.elapsed())
}

/// A network device, its driver, and what it is connected to.
struct Network {
    driver: FakeDriver,
    peer: UnixStream,
}

impl Network {
    fn new() -> anyhow::Result<Self> {
        let (peer, back_end) = UnixStream::pair()?;
        let spec = NetSpec {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: None,
            backend: NetBackend::Stream(back_end.into()),
            rates: Arc::new(RateLimits::default()),
            watcher: None,
        };
        let (spec, _link) = Net::spec("net", spec)?;
        Ok(Self { driver: FakeDriver::ready(spec, u64::MAX), peer })
    }

    /// The driver sends; a thread reads what comes out.
    fn transmit(mut self, load: Load) -> anyhow::Result<Duration> {
        let Load { frames, bytes } = load;
        let length = u32::try_from(DRIVER_HEADER + bytes).expect("a frame");
        let frame = [vec![0; DRIVER_HEADER], vec![7; bytes]].concat();
        let ram = self.driver.ram();
        let place = |_| {
            let address = ram.allocate(length.into());
            ram.write(address, &frame);
            Segment { address, length, writable: false }
        };
        let places: Vec<Segment> = (0..DEPTH).map(place).collect();
        let peer = self.peer.try_clone()?;
        let reader = thread::spawn(move || read_frames(&peer, load));
        let begin = Instant::now();
        let (mut left, mut done) = (frames, 0);
        for segment in places {
            self.driver.add(TX, &[segment]);
            left -= 1;
        }
        self.driver.notify(TX);
        while done < frames {
            let mut used = Some(self.driver.wait_used(TX));
            while let Some(sent) = used {
                done += 1;
                if left > 0 {
                    self.driver.add(TX, &sent.segments);
                    left -= 1;
                }
                used = self.driver.poll(TX);
            }
            self.driver.notify(TX);
        }
        reader.join().expect("no panic")?;
        Ok(begin.elapsed())
    }

    /// A thread writes; the driver receives what comes in.
    fn receive(mut self, load: Load) -> anyhow::Result<Duration> {
        let ram = self.driver.ram();
        let place = |_| Segment { address: ram.allocate(RX_BYTES.into()), length: RX_BYTES, writable: true };
        let places: Vec<Segment> = (0..DEPTH).map(place).collect();
        for segment in places {
            self.driver.add(RX, &[segment]);
        }
        self.driver.notify(RX);
        let peer = self.peer.try_clone()?;
        let begin = Instant::now();
        let writer = thread::spawn(move || write_frames(&peer, load));
        // A frame is in as many buffers as it needs; the header is before its first byte.
        let mut left = load.frames as usize * (DRIVER_HEADER + load.bytes);
        while left > 0 {
            let mut used = Some(self.driver.wait_used(RX));
            while let Some(received) = used {
                let written = received.written as usize;
                ensure!(written <= left, "{written} bytes came, and {left} were left");
                left -= written;
                self.driver.add(RX, &received.segments);
                used = self.driver.poll(RX);
            }
            self.driver.notify(RX);
        }
        let time = begin.elapsed();
        writer.join().expect("no panic")?;
        Ok(time)
    }
}
