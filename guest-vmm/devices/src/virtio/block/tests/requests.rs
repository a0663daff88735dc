//! Each type of request, and what the configuration says.

use super::*;
use inspect::Update;
use std::time::Duration;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG;

#[test]
fn reads_give_what_is_on_the_disk() {
    let mut stage = Stage::new();
    assert_eq!(stage.read(0, 1), (OK, pattern(0, 1)));
    assert_eq!(stage.read(SECTORS - 1, 1), (OK, pattern(SECTORS - 1, 1)));
    assert_eq!(stage.read(5, 1000), (OK, pattern(5, 1000)));
    // In pieces of any length.
    let pieces = [1, 511, 1024, 100, 924].map(Buffer::In);
    let (status, reply) = stage.request(VIRTIO_BLK_T_IN, 7, &pieces);
    assert_eq!((status, reply.written, reply.data), (OK, 2561, pattern(7, 5)));
}

#[test]
fn writes_reach_the_file() {
    let mut stage = Stage::new();
    assert_eq!(stage.write(3, &pattern(100, 2)), OK);
    let pieces = pattern(200, 4);
    let pieces = [&pieces[..3], &pieces[3..700], &pieces[700..]].map(Buffer::Out);
    let (status, reply) = stage.request(VIRTIO_BLK_T_OUT, 5, &pieces);
    assert_eq!((status, reply.written), (OK, 1));
    let expected = [pattern(0, 3), pattern(100, 2), pattern(200, 4), pattern(9, 2039)].concat();
    assert!(stage.on_file(0, SECTORS) == expected);
    assert_eq!(stage.read(2, 8), (OK, expected[1024..5120].to_vec()));
}

/// The status and the header need not be in buffers of their own (2.7.4.2).
#[test]
fn any_framing_will_do() {
    let mut stage = Stage::new();
    let header = header(VIRTIO_BLK_T_IN, 1);
    let buffers = [Buffer::Out(&header[..3]), Buffer::Out(&header[3..]), Buffer::In(500), Buffer::In(13)];
    let reply = stage.driver.request(0, &buffers);
    assert_eq!((&reply.data[..512], reply.data[512]), (&pattern(1, 1)[..], OK));
    let whole = [&super::header(VIRTIO_BLK_T_OUT, 1)[..], &pattern(50, 1)].concat();
    let reply = stage.driver.request(0, &[Buffer::Out(&whole), Buffer::In(1)]);
    assert_eq!(reply.data, [OK]);
    assert_eq!(stage.on_file(1, 1), pattern(50, 1));
}

#[test]
fn a_request_may_have_more_pieces_than_the_host_takes_at_once() {
    let mut stage = Stage::new();
    let (ram, sectors) = (stage.driver.ram(), 250);
    let (head, data) = (ram.allocate(16), ram.allocate(sectors * 512));
    ram.write(head, &header(VIRTIO_BLK_T_IN, 2));
    let segment =
        |address, length, writable| crate::virtio::fake_driver::Segment { address, length, writable };
    let mut segments = vec![segment(head, 16, false)];
    segments.extend((0..sectors).map(|at| segment(data + at * 512, 512, true)));
    let status = ram.allocate(1);
    segments.push(segment(status, 1, true));
    stage.driver.add(0, &segments);
    stage.driver.notify(0);
    stage.driver.wait_used(0);
    assert_eq!(stage.driver.ram().read(status, 1), [OK]);
    assert!(stage.driver.ram().read(data, usize::try_from(sectors * 512).unwrap()) == pattern(2, sectors));
}

#[test]
fn flushes_succeed_and_the_id_is_told() {
    let mut stage = Stage::new();
    assert_eq!(stage.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    let (status, reply) = stage.request(VIRTIO_BLK_T_GET_ID, 0, &[Buffer::In(20)]);
    assert_eq!(
        (status, reply.written, &reply.data[..]),
        (OK, 21, &b"a disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..])
    );
    let (status, reply) = stage.request(VIRTIO_BLK_T_GET_ID, 0, &[Buffer::In(4)]);
    assert_eq!((status, &reply.data[..]), (OK, &b"a di"[..]));
}

#[test]
fn zeros_are_written_and_discards_make_holes() {
    let mut stage = Stage::new();
    assert_eq!(stage.range(VIRTIO_BLK_T_WRITE_ZEROES, 8, 3, 0), OK);
    assert_eq!(stage.range(VIRTIO_BLK_T_WRITE_ZEROES, 16, 8, 1), OK);
    assert_eq!(stage.on_file(0, 24), [pattern(0, 8), vec![0; 1536], pattern(11, 5), vec![0; 4096]].concat());
    let blocks = |stage: &Stage| rustix::fs::fstat(&stage.file).expect("stat").st_blocks;
    let before = blocks(&stage);
    assert_eq!(stage.range(VIRTIO_BLK_T_DISCARD, 1024, 1024, 0), OK);
    assert!(blocks(&stage) <= before - 1024, "the space is given back");
    assert_eq!(stage.handle.capacity_bytes(), SECTORS * 512);
    assert_eq!(stage.file.metadata().expect("stat").len(), SECTORS * 512);
}

#[test]
fn ranges_that_are_wrong_are_refused() {
    let mut stage = Stage::new();
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    for (kind, sector, sectors, flags, status) in [
        (discard, 0, 1, 1, UNSUPPORTED),
        (discard, 0, 1, 2, UNSUPPORTED),
        (zeroes, 0, 1, 2, UNSUPPORTED),
        (zeroes, 0, 0, 0, IO_ERROR),
        (discard, SECTORS, 1, 0, IO_ERROR),
        (discard, SECTORS - 1, 2, 0, IO_ERROR),
        (zeroes, u64::MAX, 1, 0, IO_ERROR),
        (zeroes, 0, u32::MAX, 0, IO_ERROR),
        (discard, 0, u32::MAX, 0, IO_ERROR),
    ] {
        assert_eq!(stage.range(kind, sector, sectors, flags), status, "{kind} {sector} {sectors} {flags}");
    }
    for length in [0, 15, 17, 32] {
        let bytes = vec![0; length];
        let buffers = if length == 0 { vec![] } else { vec![Buffer::Out(&bytes)] };
        assert_eq!(stage.request(discard, 0, &buffers).0, IO_ERROR, "{length} bytes");
    }
    assert!(stage.on_file(0, SECTORS) == pattern(0, SECTORS));
}

#[test]
fn sectors_that_are_not_there_are_refused() {
    let mut stage = Stage::new();
    for (sector, bytes) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 511),
        (0, 513),
        (0, 1),
    ] {
        let (status, reply) = stage.request(VIRTIO_BLK_T_IN, sector, &[Buffer::In(bytes)]);
        assert_eq!((status, reply.written), (IO_ERROR, 1), "{sector} {bytes}");
        let data = vec![0; bytes as usize];
        assert_eq!(stage.write(sector, &data), IO_ERROR, "{sector} {bytes}");
    }
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        assert_eq!(stage.request(kind, 0, &[]).0, IO_ERROR, "nothing to do");
    }
    assert!(stage.on_file(0, SECTORS) == pattern(0, SECTORS));
    assert!(stage.errors.lock().expect("unpoisoned").is_empty(), "the guest's mistakes are not the host's");
    stage.works();
}

#[test]
fn other_types_are_not_supported() {
    let mut stage = Stage::new();
    for kind in [2, 3, 14, 15, 16, 99, u32::MAX] {
        assert_eq!(stage.request(kind, 0, &[Buffer::In(512)]).0, UNSUPPORTED, "{kind}");
        assert_eq!(stage.request(kind, 0, &[]).0, UNSUPPORTED, "{kind}");
    }
    stage.works();
}

#[test]
fn a_read_only_disk_is_only_read() {
    let mut stage = Stage::of(Shape { read_only: true, ..Shape::default() });
    let offered = stage.driver.offered();
    assert_eq!(offered >> VIRTIO_BLK_F_RO & 1, 1);
    assert_eq!(offered & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
    assert_eq!(stage.write(0, &[1; SECTOR]), IO_ERROR);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(stage.range(kind, 0, 1, 0), IO_ERROR);
    }
    assert_eq!(stage.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    stage.works();
    assert!(stage.on_file(0, SECTORS) == pattern(0, SECTORS));
}

#[test]
fn the_configuration_describes_the_disk() {
    let stage = Stage::new();
    let driver = &stage.driver;
    assert_eq!(driver.config::<u64>(0), SECTORS);
    assert_eq!((driver.config::<u32>(12), driver.config::<u32>(20)), (254, 512));
    let exponent: u8 = driver.config(24);
    assert_eq!(u16::from(1u8 << exponent), driver.config::<u16>(26));
    assert_eq!((driver.config::<u8>(32), driver.config::<u16>(34)), (1, 1));
    assert_eq!((driver.config::<u32>(36), driver.config::<u32>(40)), (1 << 21, 1));
    assert_eq!(
        (driver.config::<u32>(48), driver.config::<u32>(52), driver.config::<u8>(56)),
        (1 << 15, 1, 1)
    );
    assert_eq!(driver.offered() >> VIRTIO_BLK_F_MQ & 1, 0);
}

#[test]
fn several_queues_are_served() {
    let mut stage = Stage::of(Shape { queues: 3, ..Shape::default() });
    assert_eq!((stage.driver.offered() >> VIRTIO_BLK_F_MQ & 1, stage.driver.config::<u16>(34)), (1, 3));
    for round in 0..50 {
        for queue in [2, 0, 1] {
            let header = header(VIRTIO_BLK_T_IN, round);
            let buffers = [Buffer::Out(&header), Buffer::In(512), Buffer::In(1)];
            let reply = stage.driver.request(queue, &buffers);
            assert_eq!((&reply.data[..512], reply.data[512]), (&pattern(round, 1)[..], OK));
        }
    }
}

#[test]
fn writing_through_is_chosen_by_the_driver_or_by_what_it_knows() {
    for features in [u64::MAX, !(1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE)] {
        let mut stage = Stage::of(Shape { features, ..Shape::default() });
        stage.driver.write_config(32, 0u8);
        assert_eq!(stage.driver.config::<u8>(32), 0);
        assert_eq!(stage.write(1, &pattern(9, 1)), OK);
        assert_eq!(stage.range(VIRTIO_BLK_T_WRITE_ZEROES, 2, 1, 0), OK);
        assert_eq!(stage.on_file(1, 2), [pattern(9, 1), vec![0; 512]].concat());
        stage.driver.reset();
        assert_eq!(stage.driver.config::<u8>(32), 1, "a new driver begins with a cache");
    }
}

#[test]
fn a_capacity_can_be_changed_within_the_image() {
    let mut stage = Stage::new();
    stage.driver.acknowledge();
    let edges = stage.driver.edges();
    stage.handle.set_capacity(4096).expect("smaller");
    assert_eq!((stage.driver.config::<u64>(0), stage.handle.capacity_bytes()), (8, 4096));
    assert_eq!((stage.driver.edges(), stage.driver.acknowledge()), (edges + 1, VIRTIO_MMIO_INT_CONFIG));
    assert_eq!((stage.read(7, 1).0, stage.read(8, 1).0), (OK, IO_ERROR));
    let refused = |stage: &Stage, bytes| stage.handle.set_capacity(bytes).expect_err("refused").to_string();
    assert_eq!(refused(&stage, 1000), "1000 bytes are no whole sectors of 512");
    assert_eq!(
        refused(&stage, SECTORS * 512 + 512),
        "1049088 bytes are more than the 1048576 that the image has: enlarge that first"
    );
    stage.file.set_len(SECTORS * 1024).expect("enlarged");
    update(&mut stage, "device/capacity_bytes", &(SECTORS * 1024).to_string()).expect("there is so much");
    assert_eq!(stage.driver.config::<u64>(0), SECTORS * 2);
    assert_eq!(stage.read(SECTORS * 2 - 1, 1), (OK, vec![0; 512]));
    let error = update(&mut stage, "device/capacity_bytes", "1").expect_err("refused");
    assert_eq!(error.to_string(), "refused: 1 bytes are no whole sectors of 512");
}

fn update(stage: &mut Stage, path: &str, value: &str) -> Result<inspect::Value, inspect::UpdateError> {
    let update = Update::start(path, value, |request| stage.driver.device().inspect_mut(request));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(update.finish(Duration::ZERO))
}
