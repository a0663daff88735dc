//! Images in the qcow2 format, and what blocks a thread.

use super::under_way::{check, send_reads};
use super::*;
use crate::virtio::block::blocking::{BlockingDisk, BlockingImage};
use crate::virtio::block::{ImageError, Qcow2Disk};
use std::io;
use virtio_bindings::virtio_blk::*;

const V2: u8 = 2;

/// Bytes of an image, and where.
type Patch<'a> = (u64, &'a [u8]);

fn stage(file: File) -> Stage {
    let image = Backing::Qcow2.image(&file);
    Stage::with(file, image, Shape::default())
}

fn patched(patches: &[Patch<'_>]) -> File {
    let file = Backing::Qcow2.file(64);
    for (at, bytes) in patches {
        file.write_all_at(bytes, *at).expect("written");
    }
    file
}

fn open(file: &File, writable: bool) -> Result<DiskImage, ImageError> {
    let file = OwnedFd::from(file.try_clone().expect("a descriptor"));
    Qcow2Disk::open(ImageFile::lock(file, writable)?, writable)
}

#[test]
fn what_is_written_is_in_the_image_for_the_next_guest() {
    for version in [3, V2] {
        let file = Backing::Qcow2.file(SECTORS);
        file.write_all_at(&[version], 7).expect("written");
        let mut stage = stage(file.try_clone().expect("a descriptor"));
        stage.works();
        assert_eq!(stage.driver.config::<u64>(0), SECTORS);
        assert_eq!(stage.write(3, &pattern(100, 2)), OK);
        let (zeroes, discard) = (VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD);
        assert_eq!(stage.range(zeroes, 7, 2, 0), OK, "version {version}");
        assert_eq!(stage.range(zeroes, 200, 300, 0), OK, "version {version}");
        assert_eq!(stage.range(zeroes, 600, 300, 1), OK, "version {version}");
        assert_eq!(stage.range(discard, 1024, 256, 0), OK, "version {version}");
        assert_eq!(stage.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
        let mut expected = pattern(0, SECTORS);
        expected[3 * 512..5 * 512].copy_from_slice(&pattern(100, 2));
        for zeroes in [7..9, 200..500, 600..900] {
            expected[zeroes.start * 512..zeroes.end * 512].fill(0);
        }
        for sectors in [0..1024, 1280..2048] {
            let bytes = sectors.start * 512..sectors.end * 512;
            let read = stage.read(sectors.start as u64, sectors.len() as u64);
            assert!(read == (OK, expected[bytes].to_vec()), "version {version}");
        }
        drop(stage);
        let kept = Backing::Qcow2.contents(&file, SECTORS);
        assert!(kept[..1024 * 512] == expected[..1024 * 512], "version {version}");
    }
}

/// The image is up to date at every stop, for whoever opens it while the device waits.
#[test]
fn a_stopped_disk_has_its_image_up_to_date() {
    let file = Backing::Qcow2.file(SECTORS);
    let mut stage = stage(file.try_clone().expect("a descriptor"));
    // A whole cluster, so that it is the image's tables that change.
    assert_eq!(stage.range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 128, 1), OK);
    stage.driver.stop();
    assert!(Backing::Qcow2.contents(&file, 129) == [vec![0; 128 * SECTOR], pattern(128, 1)].concat());
}

#[test]
fn a_request_larger_than_the_buffer_is_moved_in_parts() {
    let file = Backing::Qcow2.file(8192);
    let mut stage = stage(file);
    let (status, data) = stage.read(1, 5000);
    assert!(status == OK && data == pattern(1, 5000));
    assert_eq!(stage.write(3, &pattern(10_000, 4500)), OK);
    assert!(stage.read(2, 4502) == (OK, [pattern(2, 1), pattern(10_000, 4500), pattern(4503, 1)].concat()));
}

#[test]
fn an_image_that_cannot_be_used_says_why() {
    let backing = [(8, &1024u64.to_be_bytes()[..]), (16, &10u32.to_be_bytes()), (1024, b"/etc/image")];
    let cases: [(&[Patch<'_>], &str); 8] = [
        (&[(0, b"RAW!")], "its first bytes are not those of one"),
        (&[(7, &[9])], "qcow2 v9 is not supported"),
        (&[(20, &99u32.to_be_bytes())], "cluster"),
        (&[(32, &[0, 0, 0, 2])], "it is encrypted (crypt_method 2)"),
        (&[(79, &[1])], "dirty"),
        (&[(79, &[2])], "corrupt"),
        (&[(79, &[4])], "its data is in another file, which is not opened"),
        (&backing, "it needs the backing file \"/etc/image\", which is not opened"),
    ];
    for (patches, reason) in cases {
        for writable in [false, true] {
            let error = open(&patched(patches), writable).expect_err(reason);
            assert!(matches!(error, ImageError::Qcow2(_)), "{error:?}");
            assert!(error.to_string().contains(reason), "{reason}: {error}");
        }
    }
    let empty = open(&patched(&[(24, &[0; 8])]), true).expect_err("empty");
    assert!(matches!(empty, ImageError::Empty(0)), "{empty:?}");
    let raw = open(&patterned_file(1), false).expect_err("no image");
    assert!(matches!(raw, ImageError::Qcow2(_)), "{raw:?}");
}

/// Opened or refused, and if it was opened the disk says how each request ends.
#[test]
fn a_broken_image_breaks_nothing_else() {
    let whole = Backing::Qcow2.file(64).metadata().expect("stat").len();
    let header = (4..112).flat_map(|at| [0x01, 0xff].map(|byte| (at, byte)));
    let tables = (112..whole).step_by(2039).map(|at| (at, 0xff));
    for (at, byte) in header.chain(tables) {
        let file = patched(&[(at, &[byte])]);
        let Ok(image) = open(&file, true) else { continue };
        let mut stage = Stage::with(file, image, Shape::default());
        let sectors = stage.handle.capacity_bytes() / 512;
        for sector in [0, sectors - 1] {
            let ended = [
                stage.read(sector, 1).0,
                stage.write(sector, &[1; SECTOR]),
                stage.range(VIRTIO_BLK_T_WRITE_ZEROES, sector, 1, 1),
                stage.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0,
            ];
            assert!(ended.iter().all(|status| [OK, IO_ERROR].contains(status)), "{at}: {ended:?}");
        }
    }
}

#[test]
fn stops_resets_and_drops_in_the_middle_lose_nothing() {
    let mut stage = stage(Backing::Qcow2.file(SECTORS));
    for _ in 0..20 {
        let mut sent = send_reads(&mut stage, 0..64);
        stage.driver.stop();
        while let Some(used) = stage.driver.poll(0) {
            check(&mut stage, &mut sent, &used);
        }
        stage.driver.start();
        while !sent.is_empty() {
            let used = stage.driver.wait_used(0);
            check(&mut stage, &mut sent, &used);
        }
        send_reads(&mut stage, 0..64);
        stage.driver.reset();
        let before = stage.driver.ram().read(0, 1 << 20);
        stage.driver.start();
        assert!(stage.driver.ram().read(0, 1 << 20) == before, "nothing is written after a reset");
        stage.driver.initialize(EVENT_IDX);
        stage.works();
    }
    send_reads(&mut stage, 0..64);
}

/// Reads ones, and panics over a write.
#[derive(Debug)]
struct Panics;

impl BlockingImage for Panics {
    fn read(&mut self, _: u64, to: &mut [u8]) -> io::Result<()> {
        to.fill(1);
        Ok(())
    }

    fn write(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        panic!("a test's panic, to be caught")
    }

    fn zero(&mut self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn discard(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_panic_over_an_image_ends_the_disk_and_not_the_device() {
    let disk = BlockingDisk::spawn("panics", Panics).expect("a thread");
    let image = DiskImage { disk: Box::new(disk), size: Arc::new(SECTORS * 512), physical_block_bytes: 512 };
    let mut stage = Stage::with(patterned_file(1), image, Shape::default());
    assert_eq!(stage.read(0, 1), (OK, vec![1; 512]));
    assert_eq!(stage.range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 0), IO_ERROR, "zeros are written");
    assert_eq!(stage.read(0, 1).0, IO_ERROR, "the image is not touched any more");
    let errors = stage.errors.lock().expect("unpoisoned").clone();
    assert!(errors[1].error.contains("given up"), "{errors:?}");
    assert_eq!(stage.request(VIRTIO_BLK_T_GET_ID, 0, &[Buffer::In(20)]).0, OK);
}
