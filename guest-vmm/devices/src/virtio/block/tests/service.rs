//! Disks whose data somebody else keeps.

use super::under_way::{check, send_reads};
use super::*;
use crate::virtio::block::{PIECE, ServiceCall, ServiceDisk, ServiceRequest};
use rustix::fs::FallocateFlags;
use std::io;
use tokio::sync::mpsc;
use virtio_bindings::virtio_blk::*;

/// How many calls are kept waiting for the next one, which is then answered first.
const HELD: usize = 3;

/// The disk in a file, answered for by a thread: what came last first, as long as more comes.
pub(super) fn image(file: File) -> DiskImage {
    let bytes = file.metadata().expect("stat").len();
    let (image, mut calls) = ServiceDisk::image(bytes, 4096);
    std::thread::spawn(move || {
        let mut held = Vec::new();
        while let Some(call) = next(&mut calls, &mut held) {
            let ServiceCall { request, reply } = call;
            reply.send(answer(&file, &request));
        }
    });
    image
}

/// The next call to be answered.
fn next(calls: &mut mpsc::Receiver<ServiceCall>, held: &mut Vec<ServiceCall>) -> Option<ServiceCall> {
    while held.len() < HELD
        && let Ok(call) = calls.try_recv()
    {
        held.push(call);
    }
    held.pop().or_else(|| calls.blocking_recv())
}

fn answer(file: &File, request: &ServiceRequest) -> io::Result<Vec<u8>> {
    match request {
        ServiceRequest::Read { offset, count } => {
            let mut bytes = vec![0; *count as usize];
            file.read_exact_at(&mut bytes, *offset).map(|()| bytes)
        }
        ServiceRequest::Write { offset, bytes, .. } => file.write_all_at(bytes, *offset).map(|()| Vec::new()),
        ServiceRequest::Flush => Ok(Vec::new()),
        ServiceRequest::Discard { .. } => Ok(Vec::new()),
        ServiceRequest::WriteZeroes { offset, count, .. } => {
            rustix::fs::fallocate(file, FallocateFlags::ZERO_RANGE, *offset, *count)?;
            Ok(Vec::new())
        }
    }
}

/// A disk over a service that does as the test says.
fn stage(sectors: u64) -> (Stage, mpsc::Receiver<ServiceCall>) {
    let (image, calls) = ServiceDisk::image(sectors * 512, 512);
    (Stage::with(patterned_file(1), image, Shape::default()), calls)
}

fn send_read(stage: &mut Stage, sector: u64, bytes: u32) {
    let header = header(VIRTIO_BLK_T_IN, sector);
    stage.driver.send(0, &[Buffer::Out(&header), Buffer::In(bytes), Buffer::In(1)]);
}

/// The status of the request that ends next.
fn status(stage: &mut Stage) -> u8 {
    let used = stage.driver.wait_used(0);
    // A request that failed has written its status alone, after what was to be read.
    *stage.driver.take(&used).data.last().expect("a byte")
}

#[test]
fn a_large_request_is_many_small_ones() {
    let sectors = 24 * u64::from(PIECE) / 512;
    let file = patterned_file(sectors);
    let mut stage = Stage::with(file_again(&file), image(file), Shape::default());
    let data = pattern(77, sectors);
    assert_eq!(stage.write(0, &data), OK);
    assert!(stage.read(0, sectors) == (OK, data));
}

#[test]
fn so_many_pieces_are_under_way_and_no_more() {
    let (mut stage, mut calls) = stage(1 << 16);
    send_read(&mut stage, 0, 20 * PIECE);
    let mut taken: Vec<_> = (0..16).map(|_| calls.blocking_recv().expect("asked")).collect();
    assert!(calls.try_recv().is_err(), "sixteen are asked at a time");
    let place = |call: &ServiceCall| match call.request {
        ServiceRequest::Read { offset, count: PIECE } => offset / u64::from(PIECE),
        ref other => panic!("{other:?}"),
    };
    assert_eq!(taken.iter().map(place).collect::<Vec<_>>(), (0..16).collect::<Vec<_>>());
    let data = |at: u64| vec![u8::try_from(at).expect("small"); PIECE as usize];
    for at in (16..20).chain(std::iter::repeat_n(20, 16)) {
        // The last first: order does not matter.
        let call = taken.pop().expect("under way");
        let answered = data(place(&call));
        call.reply.send(Ok(answered));
        if at < 20 {
            taken.insert(0, calls.blocking_recv().expect("the next one"));
        }
    }
    let used = stage.driver.wait_used(0);
    let read = stage.driver.take(&used).data;
    assert_eq!(read.last(), Some(&OK));
    assert!(read[..read.len() - 1] == (0..20).flat_map(data).collect::<Vec<_>>());
}

#[test]
fn one_piece_that_fails_fails_its_request_alone() {
    let (mut stage, mut calls) = stage(1 << 16);
    send_read(&mut stage, 0, 40 * PIECE);
    send_read(&mut stage, 8, 512);
    let taken: Vec<_> = (0..16).map(|_| calls.blocking_recv().expect("asked")).collect();
    for (at, call) in taken.into_iter().enumerate() {
        let failed = (at == 3).then(|| Err(io::Error::other("a bad sector")));
        call.reply.send(failed.unwrap_or_else(|| Ok(vec![0; PIECE as usize])));
    }
    // What was asked between the failure's telling and its being heard.
    let other = loop {
        let call = calls.blocking_recv().expect("asked");
        match call.request {
            ServiceRequest::Read { offset: 4096, count: 512 } => break call,
            _ => call.reply.send(Ok(vec![0; PIECE as usize])),
        }
    };
    assert_eq!(status(&mut stage), IO_ERROR);
    other.reply.send(Ok(vec![7; 512]));
    assert_eq!(status(&mut stage), OK);
    let errors = stage.errors.lock().expect("unpoisoned").clone();
    assert_eq!((errors.len(), errors[0].what, &errors[0].error[..]), (1, "read", "a bad sector"));
}

#[test]
fn an_answer_of_another_length_is_an_error() {
    let (mut stage, mut calls) = stage(64);
    for (length, expected) in [(511, IO_ERROR), (513, IO_ERROR), (0, IO_ERROR), (512, OK)] {
        send_read(&mut stage, 0, 512);
        calls.blocking_recv().expect("asked").reply.send(Ok(vec![0; length]));
        assert_eq!(status(&mut stage), expected, "{length} bytes");
    }
}

#[test]
fn what_nobody_answers_has_failed() {
    let (mut stage, mut calls) = stage(64);
    send_read(&mut stage, 0, 512);
    drop(calls.blocking_recv().expect("asked"));
    assert_eq!(status(&mut stage), IO_ERROR, "dropped");
    drop(calls);
    assert_eq!(stage.read(0, 1).0, IO_ERROR, "asked of nobody");
    assert_eq!(stage.write(0, &[0; SECTOR]), IO_ERROR);
    assert_eq!(stage.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, IO_ERROR);
    assert!(!stage.driver.needs_reset());
}

#[test]
fn what_is_asked_has_all_that_the_guest_has_said() {
    let (mut stage, mut calls) = stage(64);
    let mut asked = |stage: &mut Stage, kind, data: &[u8]| {
        let header = header(kind, 3);
        stage.driver.send(0, &[Buffer::Out(&header), Buffer::Out(data), Buffer::In(1)]);
        let ServiceCall { request, reply } = calls.blocking_recv().expect("asked");
        reply.send(Ok(Vec::new()));
        assert_eq!(status(stage), OK);
        request
    };
    let bytes = pattern(0, 1);
    let write = |durable| ServiceRequest::Write { offset: 1536, bytes: bytes.clone(), durable };
    assert_eq!(asked(&mut stage, VIRTIO_BLK_T_OUT, &bytes), write(false));
    let discard = asked(&mut stage, VIRTIO_BLK_T_DISCARD, &range(8, 16, 0));
    assert_eq!(discard, ServiceRequest::Discard { offset: 4096, count: 8192 });
    for unmap in [false, true] {
        let zeros = asked(&mut stage, VIRTIO_BLK_T_WRITE_ZEROES, &range(8, 16, unmap.into()));
        let expected = ServiceRequest::WriteZeroes { offset: 4096, count: 8192, unmap, durable: false };
        assert_eq!(zeros, expected);
    }
    // A driver that chooses writethrough has every write durable when it ends (5.2.5.1).
    stage.driver.write_config(32, 0u8);
    assert_eq!(asked(&mut stage, VIRTIO_BLK_T_OUT, &bytes), write(true));
}

#[test]
fn stops_and_starts_in_the_middle_lose_nothing() {
    let file = patterned_file(SECTORS);
    let mut stage = Stage::with(file_again(&file), image(file), Shape::default());
    for _ in 0..20 {
        let mut sent = send_reads(&mut stage, 0..64);
        stage.driver.stop();
        stage.driver.start();
        while !sent.is_empty() {
            let used = stage.driver.wait_used(0);
            check(&mut stage, &mut sent, &used);
        }
    }
}
