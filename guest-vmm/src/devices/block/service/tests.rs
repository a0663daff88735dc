//! A disk and its service, by what a driver sees of them.

use super::*;
use ::devices::virtio::block::{Block, BlockOptions, OnError};
use ::devices::virtio::fake_driver::{Buffer, FakeDriver};
use ::devices::virtio::rate_limit::RateLimits;
use guest_schema::GuestError;
use std::cell::{Cell, RefCell};
use std::sync::{Arc, Mutex};
use tokio::runtime::Builder;
use tokio::task::LocalSet;

const READ: u8 = 0;
const WRITE: u8 = 1;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const DISK: usize = 4 << 20;

fn place(offset: u64) -> usize {
    offset.try_into().expect("inside the disk")
}

/// What becomes of the next calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
    Willing,
    Refusing,
    Failing,
    Silent,
}

/// Keeps a disk in a vector.
struct Keeper {
    data: RefCell<Vec<u8>>,
    moods: RefCell<Vec<Mood>>,
    moving: Cell<usize>,
    most: Rc<Cell<usize>>,
}

impl Keeper {
    /// The last mood stays.
    async fn mood(&self) -> capnp::Result<Option<Failure>> {
        let mood = match &mut *self.moods.borrow_mut() {
            moods if moods.len() > 1 => moods.remove(0),
            moods => moods[0],
        };
        match mood {
            Mood::Willing => Ok(None),
            Mood::Refusing => Ok(Some(Failure::new(GuestError::NoResources, "no more"))),
            Mood::Failing => Err(capnp::Error::failed("a bug".into())),
            Mood::Silent => std::future::pending().await,
        }
    }

    /// Moves some bytes, and lets others begin meanwhile.
    async fn moves(&self, bytes: usize) {
        self.moving.set(self.moving.get() + bytes);
        self.most.set(self.most.get().max(self.moving.get()));
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        self.moving.set(self.moving.get() - bytes);
    }
}

impl block_service::Server for Keeper {
    async fn info(
        self: Rc<Self>,
        _: block_service::InfoParams,
        mut results: block_service::InfoResults,
    ) -> capnp::Result<()> {
        let bytes = self.data.borrow().len() as u64;
        BlockServiceInfo { bytes, block_bytes: 512, read_only: false }.write(results.get().init_info());
        Ok(())
    }

    async fn read(
        self: Rc<Self>,
        params: block_service::ReadParams,
        mut results: block_service::ReadResults,
    ) -> capnp::Result<()> {
        let (offset, count) = (place(params.get()?.get_offset()), params.get()?.get_count() as usize);
        if let Some(failure) = self.mood().await? {
            failure.write(results.get().init_error());
            return Ok(());
        }
        self.moves(count).await;
        results.get().set_bytes(&self.data.borrow()[offset..offset + count]);
        Ok(())
    }

    async fn write(
        self: Rc<Self>,
        params: block_service::WriteParams,
        mut results: block_service::WriteResults,
    ) -> capnp::Result<()> {
        let (offset, bytes) = (place(params.get()?.get_offset()), params.get()?.get_bytes()?);
        let refused = self.mood().await?;
        if refused.is_none() {
            self.moves(bytes.len()).await;
            self.data.borrow_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        Failure::write_result(&refused.map_or(Ok(()), Err), results.get().init_result());
        Ok(())
    }
}

/// What a driver says while a keeper keeps the disks' data, the errors that were told, and the most bytes that moved at once.
fn play(
    moods: &[Mood],
    disks: usize,
    script: impl Fn(&mut FakeDriver) + Send + Sync + 'static,
) -> (Vec<String>, usize) {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().expect("made");
    LocalSet::new().block_on(&runtime, async {
        let (services, script) = (Services::default(), Arc::new(script));
        let (most, errors) = (Rc::new(Cell::new(0)), Arc::new(Mutex::new(Vec::new())));
        let keeper = Keeper {
            data: RefCell::new(vec![7; DISK]),
            moods: RefCell::new(moods.to_vec()),
            moving: Cell::new(0),
            most: most.clone(),
        };
        let service: block_service::Client = capnp_rpc::new_client(keeper);
        let mut drivers = Vec::new();
        for _ in 0..disks {
            let image = services.disk(service.clone(), BlockMode::ReadWrite).await.expect("a disk");
            let (told, script) = (errors.clone(), script.clone());
            let options = BlockOptions {
                id: String::new(),
                read_only: false,
                queues: 1,
                rates: Arc::new(RateLimits::default()),
                on_error: OnError::new(move |error| told.lock().expect("whole").push(error.error)),
            };
            let (spec, _) = Block::spec("block0", image, options).expect("a device");
            // No thread of the runtime, which would keep time from passing.
            let (end, ended) = tokio::sync::oneshot::channel();
            std::thread::spawn(move || {
                script(&mut FakeDriver::ready(spec, 0));
                end.send(())
            });
            drivers.push(ended);
        }
        for driver in drivers {
            driver.await.expect("the script ends");
        }
        let errors = errors.lock().expect("whole").clone();
        (errors, most.get())
    })
}

fn status(driver: &mut FakeDriver, kind: u8, data: Buffer<'_>) -> u8 {
    let mut header = [0; 16];
    header[0] = kind;
    let reply = driver.request(0, &[Buffer::Out(&header), data, Buffer::In(1)]);
    *reply.data.last().expect("a byte")
}

#[test]
fn what_becomes_of_a_call_becomes_of_the_guests_request() {
    let moods = [Mood::Refusing, Mood::Failing, Mood::Silent, Mood::Refusing, Mood::Willing];
    let (errors, _) = play(&moods, 1, |driver| {
        let read = Buffer::In(512);
        let read = [(); 3].map(|()| status(driver, READ, read));
        assert_eq!(read, [IO_ERROR; 3]);
        assert_eq!(status(driver, WRITE, Buffer::Out(&[1; 512])), IO_ERROR);
        assert_eq!(status(driver, WRITE, Buffer::Out(&[1; 512])), OK);
        assert_eq!(status(driver, READ, Buffer::In(512)), OK);
    });
    assert_eq!(errors.len(), 4, "{errors:?}");
    for (error, part) in errors.iter().zip(["refuses", "a bug", "did not answer within 10s", "no more"]) {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_service_that_does_not_know_a_method_fails_it_alone() {
    let (errors, _) = play(&[Mood::Willing], 1, |driver| {
        let mut header = [0; 16];
        header[0] = 4;
        let flush = driver.request(0, &[Buffer::Out(&header), Buffer::In(1)]);
        assert_eq!(flush.data, [IO_ERROR]);
        assert_eq!(status(driver, READ, Buffer::In(512)), OK);
    });
    assert!(errors[0].contains("flush"), "{errors:?}");
}

#[test]
fn all_disks_together_move_no_more_than_they_may() {
    let (errors, most) = play(&[Mood::Willing], 4, |driver| {
        assert_eq!(status(driver, READ, Buffer::In(DISK.try_into().expect("small"))), OK);
    });
    assert!(errors.is_empty(), "{errors:?}");
    assert!((MOVING / 2..=MOVING).contains(&most), "{most}");
}

/// Knows nothing.
struct Nobody;

impl block_service::Server for Nobody {}

#[test]
fn who_is_no_service_is_refused() {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().expect("made");
    LocalSet::new().block_on(&runtime, async {
        let service = capnp_rpc::new_client(Nobody);
        let refused = Services::default().disk(service, BlockMode::ReadOnly).await.expect_err("nobody");
        assert!(refused.to_string().contains("info"), "{refused}");
    });
}

#[test]
fn measures_that_cannot_be_are_named() {
    let info = BlockServiceInfo { bytes: 512, block_bytes: 512, read_only: false };
    let refused = |info, mode| check(info, mode).err().map(|error| error.to_string()).unwrap_or_default();
    assert_eq!(refused(info, BlockMode::ReadWrite), "");
    let empty = BlockServiceInfo { bytes: 511, ..info };
    assert_eq!(refused(empty, BlockMode::ReadWrite), "its 511 bytes are less than a sector of 512");
    for block_bytes in [0, 256, 513, 128 << 10, u32::MAX] {
        let problem = format!("its blocks of {block_bytes} bytes are no power of two from 512 to 65536");
        assert_eq!(refused(BlockServiceInfo { block_bytes, ..info }, BlockMode::ReadOnly), problem);
    }
    let read_only = BlockServiceInfo { read_only: true, ..info };
    assert_eq!(refused(read_only, BlockMode::VolatileWrite), "");
    assert_eq!(refused(read_only, BlockMode::ReadOnly), "");
    let problem = "it takes no writes, and the disk is to be written";
    assert_eq!(refused(read_only, BlockMode::ReadWrite), problem);
}
