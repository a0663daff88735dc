//! Disks of which writes stay in memory.

use super::*;
use save_restore::SaveError;
use virtio_bindings::virtio_blk::*;

/// An overlay over a disk of 2048 sectors.
fn stage() -> Stage {
    let file = patterned_file(SECTORS);
    let image = Backing::Overlay.image(&file);
    Stage::with(file, image, Shape::default())
}

#[test]
fn what_is_written_is_read_and_the_image_stays() {
    let mut stage = stage();
    assert_eq!(stage.write(3, &pattern(100, 2)), OK);
    assert_eq!(stage.write(130, &pattern(200, 1)), OK);
    assert_eq!(stage.range(VIRTIO_BLK_T_WRITE_ZEROES, 7, 2, 0), OK);
    let mut expected = pattern(0, 140);
    expected[3 * 512..5 * 512].copy_from_slice(&pattern(100, 2));
    expected[7 * 512..9 * 512].fill(0);
    expected[130 * 512..131 * 512].copy_from_slice(&pattern(200, 1));
    for (first, sectors) in [(0, 140), (3, 2), (4, 1), (3, 128), (2, 5), (7, 2), (8, 123), (130, 1)] {
        let bytes = first * 512..(first + sectors) * 512;
        assert!(stage.read(first as u64, sectors as u64) == (OK, expected[bytes].to_vec()), "{first}");
    }
    assert_eq!(stage.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    assert!(stage.on_file(0, SECTORS) == pattern(0, SECTORS));
}

#[test]
fn runs_reach_into_buffers_of_any_length() {
    let mut stage = stage();
    for sector in [1, 3, 5, 127, 128] {
        assert_eq!(stage.write(sector, &pattern(sector + 1000, 1)), OK);
    }
    let pieces = [1, 700, 513, 3000, 70_000 - 4214 - 368].map(Buffer::In);
    let (status, reply) = stage.request(VIRTIO_BLK_T_IN, 0, &pieces);
    let sector = |at| if [1, 3, 5, 127, 128].contains(&at) { at + 1000 } else { at };
    let expected: Vec<u8> = (0..136).flat_map(|at| pattern(sector(at), 1)).collect();
    assert_eq!((status, reply.written), (OK, 69_633));
    assert!(reply.data == expected);
}

#[test]
fn a_discard_gives_memory_back_and_shows_the_image() {
    let mut stage = stage();
    assert_eq!(stage.write(0, &[7; 512 * 300]), OK);
    assert_eq!(stage.range(VIRTIO_BLK_T_DISCARD, 100, 200, 0), OK);
    let expected = [vec![7; 512 * 128], pattern(128, 128), vec![7; 512 * 44], pattern(300, 1)].concat();
    assert!(stage.read(0, 301) == (OK, expected), "whole clusters are discarded");
}

#[test]
fn guests_share_an_image_and_nothing_that_they_write() {
    let file = patterned_file(SECTORS);
    let mut stages = [0u8, 1].map(|_| {
        let image = Backing::Overlay.image(&file);
        Stage::with(file.try_clone().expect("a descriptor"), image, Shape::default())
    });
    for (stage, byte) in stages.iter_mut().zip(1..) {
        assert_eq!(stage.write(5, &[byte; SECTOR]), OK);
    }
    for (stage, byte) in stages.iter_mut().zip(1..) {
        assert_eq!(stage.read(5, 1), (OK, vec![byte; SECTOR]));
        stage.works();
    }
}

#[test]
fn an_image_that_fails_is_an_error_where_it_is_needed() {
    let mut stage = stage();
    assert_eq!(stage.write(20, &pattern(1, 4)), OK);
    stage.file.set_len(8 * 512).expect("cut off");
    assert_eq!(stage.read(20, 4), (OK, pattern(1, 4)));
    assert_eq!(stage.read(20, 5).0, IO_ERROR);
    assert_eq!(stage.read(19, 1).0, IO_ERROR);
    assert_eq!(stage.write(19, &pattern(2, 1)), OK);
    assert_eq!(stage.read(19, 2), (OK, [pattern(2, 1), pattern(1, 1)].concat()));
}

#[test]
fn it_cannot_be_saved() {
    let stage = stage();
    stage.driver.stop();
    let error = stage.driver.device().save_blob().expect_err("refused");
    let mut cause = &error;
    while let SaveError::Child { source, .. } = cause {
        cause = source;
    }
    assert!(
        matches!(cause, SaveError::NotSupported { reason } if reason.contains("volatileWrite")),
        "{error:?}"
    );
}
