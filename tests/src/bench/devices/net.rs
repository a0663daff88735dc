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

const SMALL: usize = 64;
const LARGE: usize = 1500;
const FRAMES: u32 = 4000;
/// How many frames may be under way.
const DEPTH: usize = 128;
/// In front of each frame: for the driver (struct virtio_net_hdr_v1), and for the stream (its length).
const DRIVER_HEADER: usize = 12;
const STREAM_HEADER: usize = 4;
const RX: usize = 0;
const TX: usize = 1;
const RX_BYTES: u32 = 2048;

const DEFINITIONS: [Definition; 6] = [
    Definition::time("bare-frame-64", "a frame of 64 bytes over a Unix socket pair, a call each", None),
    Definition::time("net-tx-64", "the same from a guest's driver, 128 under way", Some("bare-frame-64")),
    Definition::time("net-rx-64", "the same to a guest's driver", Some("bare-frame-64")),
    Definition::time("bare-frame-1500", "a frame of 1,500 bytes over a Unix socket pair, a call each", None),
    Definition::time("net-tx-1500", "the same from a guest's driver, 128 under way", Some("bare-frame-1500")),
    Definition::time("net-rx-1500", "the same to a guest's driver", Some("bare-frame-1500")),
];

pub fn definitions() -> Vec<Definition> {
    DEFINITIONS.to_vec()
}

pub fn round(samples: &mut Samples) -> anyhow::Result<()> {
    let names = [
        ("bare-frame-64", "net-tx-64", "net-rx-64", SMALL),
        ("bare-frame-1500", "net-tx-1500", "net-rx-1500", LARGE),
    ];
    for (bare, transmit, receive, bytes) in names {
        samples.time(bare, over_a_pair(bytes)? / FRAMES);
        samples.time(transmit, Network::new()?.transmit(bytes)? / FRAMES);
        samples.time(receive, Network::new()?.receive(bytes)? / FRAMES);
    }
    Ok(())
}

/// A frame with its length before it.
fn framed(bytes: usize) -> Vec<u8> {
    let length = u32::try_from(bytes).expect("a frame").to_be_bytes();
    [&length[..], &vec![7; bytes]].concat()
}

fn write_frames(mut stream: &UnixStream, bytes: usize) -> std::io::Result<()> {
    let frame = framed(bytes);
    (0..FRAMES).try_for_each(|_| stream.write_all(&frame))
}

/// Reads as many bytes as all frames have.
fn read_frames(mut stream: &UnixStream, bytes: usize) -> std::io::Result<()> {
    let (mut buffer, mut left) = (vec![0; 64 << 10], FRAMES as usize * (STREAM_HEADER + bytes));
    while left > 0 {
        match stream.read(&mut buffer)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            count => left -= count,
        }
    }
    Ok(())
}

fn over_a_pair(bytes: usize) -> anyhow::Result<Duration> {
    let (near, far) = UnixStream::pair()?;
    let reader = thread::spawn(move || read_frames(&far, bytes));
    let begin = Instant::now();
    write_frames(&near, bytes)?;
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
    fn transmit(mut self, bytes: usize) -> anyhow::Result<Duration> {
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
        let reader = thread::spawn(move || read_frames(&peer, bytes));
        let begin = Instant::now();
        let (mut left, mut done) = (FRAMES, 0);
        for segment in places {
            self.driver.add(TX, &[segment]);
            left -= 1;
        }
        self.driver.notify(TX);
        while done < FRAMES {
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
    fn receive(mut self, bytes: usize) -> anyhow::Result<Duration> {
        let ram = self.driver.ram();
        let place = |_| Segment { address: ram.allocate(RX_BYTES.into()), length: RX_BYTES, writable: true };
        let places: Vec<Segment> = (0..DEPTH).map(place).collect();
        for segment in places {
            self.driver.add(RX, &[segment]);
        }
        self.driver.notify(RX);
        let peer = self.peer.try_clone()?;
        let begin = Instant::now();
        let writer = thread::spawn(move || write_frames(&peer, bytes));
        let mut done = 0;
        while done < FRAMES {
            let mut used = Some(self.driver.wait_used(RX));
            while let Some(received) = used {
                ensure!(
                    received.written as usize == DRIVER_HEADER + bytes,
                    "{} bytes came",
                    received.written
                );
                done += 1;
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
