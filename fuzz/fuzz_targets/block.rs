//! Any descriptors, buffers and register writes at a block device.
//!
//! Holds to: nothing panics and nothing is stuck: whatever came before, the device can be stopped, reset and set up again, and
//! reads then what is on the disk, of which nothing was written that is not the driver's to write.

#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::virtio::block::{Block, BlockOptions, ImageFile, OnError, UringDisk};
use devices::virtio::fake_driver::{Buffer, FakeDriver, RAM_BYTES};
use devices::virtio::rate_limit::RateLimits;
use libfuzzer_sys::fuzz_target;

const SECTORS: u64 = 64;
const EVENT_IDX: u64 = 1 << 29;

/// What a driver does that need not make sense.
#[derive(Arbitrary, Debug)]
enum Step {
    /// A request with a header of this type and sector and buffers of these lengths.
    Request {
        kind: u8,
        sector: u8,
        out: Vec<u16>,
        back: Vec<u16>,
    },
    /// The range of a discard or of zeros.
    Range {
        zeroes: bool,
        sector: u64,
        sectors: u32,
        flags: u8,
    },
    /// A descriptor as it stands.
    Descriptor {
        index: u16,
        address: u32,
        length: u32,
        flags: u8,
        next: u16,
    },
    /// A chain is made available.
    Available(u16),
    /// The available index jumps.
    Jump(u16),
    Memory {
        address: u32,
        bytes: [u8; 16],
    },
    Config {
        offset: u8,
        value: u32,
    },
    Register {
        offset: u8,
        value: u32,
    },
    Doorbell,
    Stop,
    Start,
    Reset,
    SaveAndRestore,
}

fn kind(kind: u8) -> u32 {
    [0, 1, 4, 8, 11, 13, 14, 99][usize::from(kind % 8)]
}

fn request(driver: &mut FakeDriver, kind: u32, sector: u64, out: &[u8], back: &[u16]) {
    let header = [u64::from(kind).to_le_bytes(), sector.to_le_bytes()].concat();
    let mut buffers = vec![Buffer::Out(&header)];
    if !out.is_empty() {
        buffers.push(Buffer::Out(out));
    }
    buffers.extend(back.iter().filter(|length| **length > 0).map(|length| Buffer::In((*length).into())));
    buffers.push(Buffer::In(1));
    if driver.ring(0).free_descriptors() >= buffers.len() {
        driver.send(0, &buffers);
    }
}

fn step(driver: &mut FakeDriver, running: &mut bool, step: Step) {
    match step {
        Step::Request { kind: type_, sector, out, back } => {
            let out: usize = out.iter().take(4).map(|length| usize::from(*length)).sum();
            request(driver, kind(type_), sector.into(), &vec![0xa5; out], &back[..back.len().min(8)]);
        }
        Step::Range { zeroes, sector, sectors, flags } => {
            let flags = u32::from(flags).to_le_bytes();
            let range = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags].concat();
            request(driver, if zeroes { 13 } else { 11 }, 0, &range, &[]);
        }
        Step::Descriptor { index, address, length, flags, next } => {
            let ring = driver.ring(0).clone();
            let (index, flags) = (index % ring.size, u32::from(flags & 7));
            ring.write_descriptor(driver.ram(), index, address.into(), length, flags, next);
        }
        Step::Available(head) => {
            let mut ring = driver.ring(0).clone();
            ring.make_available(driver.ram(), head);
            *driver.ring(0) = ring;
        }
        Step::Jump(index) => {
            let mut ring = driver.ring(0).clone();
            ring.set_available_index(driver.ram(), index);
            *driver.ring(0) = ring;
        }
        Step::Memory { address, bytes } => {
            driver.ram().write(u64::from(address) % (RAM_BYTES - 16), &bytes);
        }
        Step::Config { offset, value } => driver.write_config(offset.into(), value),
        // Not the status: a reset is a step of its own, which is waited for.
        Step::Register { offset, value } => {
            if offset & !3 != 0x70 {
                driver.write((offset & !3).into(), value);
            }
        }
        Step::Doorbell => driver.ring_doorbell(0),
        Step::Stop => stop(driver, running),
        Step::Start => {
            driver.start();
            *running = true;
        }
        Step::Reset => driver.initialize(EVENT_IDX),
        Step::SaveAndRestore => {
            stop(driver, running);
            let state = driver.save();
            driver.device().restore_blob(state).expect("its own state");
        }
    }
}

fn stop(driver: &FakeDriver, running: &mut bool) {
    driver.stop();
    *running = false;
}

fuzz_target!(|steps: Vec<Step>| {
    let file: File =
        rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd").into();
    file.set_len((SECTORS + 1) * 512).expect("room");
    let image = ImageFile::lock(OwnedFd::from(file.try_clone().expect("a descriptor")), true).expect("free");
    let options = BlockOptions {
        id: "fuzz".into(),
        read_only: false,
        queues: 1,
        rates: Arc::new(RateLimits::default()),
        on_error: OnError::new(|_| {}),
    };
    let image = UringDisk::open(image).expect("io_uring");
    let (spec, handle) = Block::spec("block0", image, options).expect("a size");
    handle.set_capacity(SECTORS * 512).expect("there is so much");
    let mut driver = FakeDriver::ready(spec, EVENT_IDX);
    let mut running = true;
    steps.into_iter().take(64).for_each(|one| step(&mut driver, &mut running, one));
    stop(&driver, &mut running);
    driver.start();
    driver.initialize(EVENT_IDX);
    let header = [0; 16];
    let reply = driver.request(0, &[Buffer::Out(&header), Buffer::In(SECTORS as u32 * 512), Buffer::In(1)]);
    let mut disk = vec![0; (SECTORS as usize + 1) * 512];
    file.read_exact_at(&mut disk, 0).expect("there");
    assert!(reply.data[..SECTORS as usize * 512] == disk[..SECTORS as usize * 512]);
    assert_eq!(reply.data.last(), Some(&0));
    assert!(disk[SECTORS as usize * 512..].iter().all(|byte| *byte == 0), "written beyond the capacity");
    assert_eq!(file.metadata().expect("stat").len(), (SECTORS + 1) * 512);
});
