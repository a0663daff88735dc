//! Block devices, by what drivers see of them.

mod faulty;
mod model;
mod overlay;
mod qcow2;
mod requests;
mod service;
mod shapes;
mod under_way;

use super::{
    Block, BlockError, BlockHandle, BlockOptions, DiskImage, ImageFile, OnError, Overlay, Qcow2Disk,
    UringDisk,
};
use crate::virtio::fake_driver::{Buffer, FakeDriver, Reply};
use crate::virtio::rate_limit::RateLimits;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const SECTOR: usize = 512;
/// Of the disks here, unless they say otherwise.
const SECTORS: u64 = 2048;

/// A disk, its driver, its host.
struct Stage {
    driver: FakeDriver,
    handle: BlockHandle,
    file: File,
    errors: Arc<Mutex<Vec<BlockError>>>,
}

/// What a stage's disk is.
#[derive(Clone, Copy)]
struct Shape {
    read_only: bool,
    queues: u16,
    features: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Self { read_only: false, queues: 1, features: u64::MAX }
    }
}

/// A file of random-looking bytes: each sector differs from every other.
fn patterned_file(sectors: u64) -> File {
    let file = tempfile::tempfile().expect("a file");
    file.write_all_at(&pattern(0, sectors), 0).expect("written");
    file
}

/// The bytes of sectors as they are at first.
fn pattern(sector: u64, sectors: u64) -> Vec<u8> {
    let words = sector * 64..(sector + sectors) * 64;
    words.flat_map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

fn image(file: &File, writable: bool) -> DiskImage {
    let file = OwnedFd::from(file.try_clone().expect("a descriptor"));
    UringDisk::open(ImageFile::lock(file, writable).expect("free")).expect("io_uring")
}

/// What keeps a disk's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backing {
    Raw,
    Qcow2,
    Service,
    Overlay,
    Qcow2Overlay,
}

impl Backing {
    const ALL: [Self; 5] = [Self::Raw, Self::Qcow2, Self::Service, Self::Overlay, Self::Qcow2Overlay];

    fn is_qcow2(self) -> bool {
        matches!(self, Self::Qcow2 | Self::Qcow2Overlay)
    }

    fn is_overlay(self) -> bool {
        matches!(self, Self::Overlay | Self::Qcow2Overlay)
    }

    /// An image with the pattern in it.
    fn file(self, sectors: u64) -> File {
        if self.is_qcow2() { qcow2_file(sectors) } else { patterned_file(sectors) }
    }

    /// The disk over such a file.
    fn image(self, file: &File) -> DiskImage {
        match self {
            Self::Raw => image(file, true),
            Self::Qcow2 => qcow2(file, true),
            Self::Service => service::image(file.try_clone().expect("again")),
            Self::Overlay => Overlay::over(image(&file_again(file), false)),
            Self::Qcow2Overlay => Overlay::over(qcow2(&file_again(file), false)),
        }
    }

    /// The first sectors in such a file.
    fn contents(self, file: &File, sectors: u64) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(sectors).unwrap() * SECTOR];
        if self.is_qcow2() {
            let file = imago::file::File::try_from(file_again(file)).expect("a file");
            let image = Qcow2::<imago::file::File>::builder(file).open(DenyImplicitOpenGate::default());
            FormatAccess::new(image.expect("an image")).read(&mut data, 0).expect("read");
        } else {
            file.read_exact_at(&mut data, 0).expect("there");
        }
        data
    }
}

fn qcow2(file: &File, writable: bool) -> DiskImage {
    let file = OwnedFd::from(file.try_clone().expect("a descriptor"));
    Qcow2Disk::open(ImageFile::lock(file, writable).expect("free"), writable).expect("an image")
}

fn qcow2_file(sectors: u64) -> File {
    let file = tempfile::tempfile().expect("a file");
    let storage =
        |file: &File| imago::file::File::try_from(file.try_clone().expect("again")).expect("a file");
    let builder = Qcow2::<imago::file::File>::create_builder(storage(&file)).size(sectors * 512);
    builder.create().expect("an image");
    let image = Qcow2::<imago::file::File>::builder(storage(&file)).write(true);
    let image = FormatAccess::new(image.open(DenyImplicitOpenGate::default()).expect("an image"));
    image.write(&pattern(0, sectors), 0).expect("written");
    image.flush().expect("written");
    file
}

/// Another open file description of a file, as another process would have.
fn file_again(file: &File) -> File {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("there")
}

impl Stage {
    fn new() -> Self {
        Self::of(Shape::default())
    }

    fn of(shape: Shape) -> Self {
        let file = patterned_file(SECTORS);
        let image = image(&file, !shape.read_only);
        Self::with(file, image, shape)
    }

    fn with(file: File, image: DiskImage, shape: Shape) -> Self {
        let mut stage = Self::stopped(file, image, shape, RateLimits::default());
        stage.driver.start();
        stage.driver.initialize(shape.features);
        stage
    }

    fn stopped(file: File, image: DiskImage, shape: Shape, rates: RateLimits) -> Self {
        let errors = Arc::new(Mutex::new(Vec::new()));
        let told = errors.clone();
        let options = BlockOptions {
            id: "a disk".into(),
            read_only: shape.read_only,
            queues: shape.queues,
            rates: Arc::new(rates),
            on_error: OnError::new(move |error| told.lock().expect("unpoisoned").push(error)),
        };
        let (spec, handle) = Block::spec("block:a", image, options).expect("a size");
        Self { driver: FakeDriver::stopped(spec), handle, file, errors }
    }

    /// Sends a request with these buffers between header and status; its status, and all else that was written.
    fn request(&mut self, kind: u32, sector: u64, buffers: &[Buffer<'_>]) -> (u8, Reply) {
        let header = header(kind, sector);
        let mut all = vec![Buffer::Out(&header)];
        all.extend(buffers);
        all.push(Buffer::In(1));
        let mut reply = self.driver.request(0, &all);
        let status = reply.data.pop().expect("a byte");
        (status, reply)
    }

    fn read(&mut self, sector: u64, sectors: u64) -> (u8, Vec<u8>) {
        let bytes = u32::try_from(sectors).unwrap() * 512;
        let (status, reply) = self.request(VIRTIO_BLK_T_IN, sector, &[Buffer::In(bytes)]);
        (status, reply.data)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.request(VIRTIO_BLK_T_OUT, sector, &[Buffer::Out(data)]).0
    }

    /// The range of a discard or a write of zeros.
    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        self.request(kind, 0, &[Buffer::Out(&range(sector, sectors, flags))]).0
    }

    fn on_file(&self, sector: u64, sectors: u64) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(sectors).unwrap() * SECTOR];
        self.file.read_exact_at(&mut data, sector * 512).expect("there");
        data
    }

    /// The device works: what was there is still there.
    fn works(&mut self) {
        assert_eq!(self.read(9, 3), (OK, pattern(9, 3)));
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&sectors.to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}
