//! Hosts that fail: the guest is told, the host is told, and the device goes on.

use super::super::{Disk, DiskImage, Ended, Operation};
use super::*;
use crate::virtio::GuestRam;
use std::io;
use std::task::{Context, Poll};
use virtio_bindings::virtio_blk::*;

#[test]
fn a_file_that_was_cut_off_gives_errors_and_the_rest_of_it() {
    let mut stage = Stage::new();
    stage.file.set_len(8 * 512).expect("cut off");
    assert_eq!(stage.read(0, 8), (OK, pattern(0, 8)));
    assert_eq!(stage.read(8, 1).0, IO_ERROR);
    assert_eq!(stage.read(7, 2).0, IO_ERROR, "half of it is not enough");
    let errors = stage.errors.lock().expect("unpoisoned").clone();
    assert_eq!(errors.len(), 2);
    assert_eq!((&errors[0].device[..], errors[0].what, errors[0].suppressed), ("block:a", "read", 0));
    assert_eq!(stage.read(1, 1), (OK, pattern(1, 1)));
}

#[test]
fn a_full_host_gives_errors() {
    // A sealed memfd cannot grow, as a full disk cannot.
    let file = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::ALLOW_SEALING).expect("a memfd");
    let file = File::from(file);
    file.write_all_at(&pattern(0, SECTORS), 0).expect("written");
    let image = image(&file, true);
    let mut stage = Stage::with(file, image, Shape::default());
    stage.file.set_len(4096).expect("cut off");
    rustix::fs::fcntl_add_seals(&stage.file, rustix::fs::SealFlags::GROW).expect("sealed");
    assert_eq!(stage.write(8, &pattern(1, 1)), IO_ERROR);
    assert_eq!(stage.write(0, &pattern(1, 1)), OK);
    assert_eq!(stage.errors.lock().expect("unpoisoned")[0].what, "write");
}

#[test]
fn not_every_failure_is_told() {
    let mut stage = Stage::new();
    stage.file.set_len(0).expect("cut off");
    for _ in 0..100 {
        assert_eq!(stage.read(0, 1).0, IO_ERROR);
    }
    assert_eq!(stage.errors.lock().expect("unpoisoned").len(), 8);
}

/// Fails everything.
#[derive(Debug, Default)]
struct Broken(Vec<Ended>);

impl Disk for Broken {
    fn start(&mut self, _: &Arc<dyn GuestRam>) -> io::Result<()> {
        Ok(())
    }

    fn begin(&mut self, tag: usize, _: Operation) {
        self.0.push(Ended { tag, result: Err(io::Error::other("broken")) });
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn take_ended(&mut self, ended: &mut Vec<Ended>) {
        ended.append(&mut self.0);
    }

    fn poll_ended(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.0.is_empty() { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn stop(&mut self) {}
}

#[test]
fn each_kind_of_failure_is_an_io_error() {
    let size = Arc::new(SECTORS * 512);
    let image = DiskImage { disk: Box::<Broken>::default(), size, physical_block_bytes: 512 };
    let mut stage = Stage::with(patterned_file(1), image, Shape::default());
    assert_eq!(stage.read(0, 1).0, IO_ERROR);
    assert_eq!(stage.write(0, &[0; SECTOR]), IO_ERROR);
    assert_eq!(stage.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, IO_ERROR);
    assert_eq!(stage.range(VIRTIO_BLK_T_DISCARD, 0, 1, 0), IO_ERROR);
    assert_eq!(stage.range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 0), IO_ERROR);
    let told: Vec<_> = stage.errors.lock().expect("unpoisoned").iter().map(|error| error.what).collect();
    assert_eq!(told, ["read", "write", "flush", "discard", "write of zeros"]);
    let (status, _) = stage.request(VIRTIO_BLK_T_GET_ID, 0, &[Buffer::In(20)]);
    assert_eq!(status, OK, "the disk is not asked for its id");
}
