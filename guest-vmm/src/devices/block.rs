//! Disks.

mod service;

use super::RequestedDevices;
use crate::config::refused;
use crate::vm::{Cancel, cancelled};
use ::devices::virtio::VirtioSpec;
use ::devices::virtio::block::{
    Block, BlockError, BlockOptions, DiskImage, ImageError, ImageFile, MAX_QUEUES, OnError, Overlay,
    Qcow2Disk, UringDisk,
};
use ::devices::virtio::rate_limit::{Rate, RateLimits};
use guest_schema::{
    BlockConfig, BlockMode, ConfigFault, DeviceError, DiskSource, Failure, FileSource, GuestError,
    ImageFormat, chain,
};
use guest_transport::Descriptors;
use service::Services;
use std::collections::HashSet;
use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// The most disks of a guest.
const MAX_DISKS: usize = 32;
/// The longest id, in bytes.
const MAX_ID: usize = 20;
/// How long a create that is cancelled waits for the image that is being opened.
const LAST_IMAGE: Duration = Duration::from_secs(5);

/// Takes the disks' images from the channel on which their config came.
pub(crate) fn take_images(
    disks: &[BlockConfig],
    descriptors: &Descriptors,
    faults: &mut Vec<ConfigFault>,
) -> Vec<Option<OwnedFd>> {
    let mut take = |(index, disk): (usize, &BlockConfig)| {
        let DiskSource::Image(_, Some(image)) = &disk.source else { return None };
        let taken = match image {
            FileSource::Descriptor(number) => descriptors.take(*number).map_err(|error| error.to_string()),
            FileSource::File(_) => {
                Err("a disk's image has to be a descriptor, which a proxied channel does not pass".into())
            }
        };
        taken.map_err(|problem| faults.push(source_fault(index, disk.source.field(), problem))).ok()
    };
    disks.iter().enumerate().map(&mut take).collect()
}

fn source_fault(index: usize, field: &str, problem: String) -> ConfigFault {
    ConfigFault::new(format!("block[{index}].{field}"), problem)
}

/// What is wrong with the disks of a config, as far as it shows without their images.
pub(super) fn faults(disks: &[BlockConfig]) -> Vec<ConfigFault> {
    let mut faults = Vec::new();
    if disks.len() > MAX_DISKS {
        faults.push(ConfigFault::new("block", format!("{} disks are more than {MAX_DISKS}", disks.len())));
    }
    let mut ids = HashSet::new();
    for (index, disk) in disks.iter().take(MAX_DISKS).enumerate() {
        let mut fault = |name: &str, problem: String| {
            faults.push(ConfigFault::new(format!("block[{index}].{name}"), problem));
        };
        if disk.id.len() > MAX_ID {
            fault("id", format!("the {} bytes of {:?} are more than {MAX_ID}", disk.id.len(), disk.id));
        } else if !disk.id.is_empty() && !ids.insert(&disk.id) {
            fault("id", format!("{:?} is another disk's", disk.id));
        }
        if !(1..=MAX_QUEUES).contains(&disk.queues) {
            fault("queues", format!("{} is not from 1 to {MAX_QUEUES}", disk.queues));
        }
        if !disk.source.is_given() {
            fault(disk.source.field(), "none was given".into());
        }
    }
    faults
}

/// Adds the disks. Whatever is wrong with an image or a service is a fault; all of them are in one failure.
///
/// Services are asked one after the other. Images are locked and first read on the blocking pool, which may take as long as a slow
/// file system lets it. When the create is cancelled, the image that is being opened is waited for, so that all are free once this
/// answers; one that takes longer than [`LAST_IMAGE`] is left to the pool, as all are when this is dropped, and the pool lets go of
/// them.
pub(super) async fn add(
    disks: &[BlockConfig],
    images: Vec<Option<OwnedFd>>,
    devices: &mut RequestedDevices,
    cancel: &Cancel,
) -> Result<(), Failure> {
    if disks.is_empty() {
        return Ok(());
    }
    let (services, mut requested) = (Services::default(), Vec::new());
    for (index, (disk, image)) in disks.iter().zip(images).enumerate() {
        let data = tokio::select! {
            biased;
            data = data(&disk.source, image, disk.mode, &services) => data,
            () = cancel.cancelled() => return Err(cancelled()),
        };
        requested.push(RequestedDisk::new(index, disk, data, &devices.told));
    }
    let flag = cancel.clone();
    let making = tokio::task::spawn_blocking(move || specs(requested, &flag));
    let given_up = async {
        cancel.cancelled().await;
        tokio::time::sleep(LAST_IMAGE).await;
    };
    let made = tokio::select! {
        made = making => made,
        () = given_up => return Err(cancelled()),
    };
    let panicked = |_| Failure::new(GuestError::InternalError, "block: opening the images panicked");
    devices.specs.extend(made.map_err(panicked)??);
    Ok(())
}

/// Where a disk's data is.
enum Data {
    Image(ImageFormat, OwnedFd),
    Service(DiskImage),
}

/// What has a disk's data, or what is wrong with that.
async fn data(
    source: &DiskSource,
    image: Option<OwnedFd>,
    mode: BlockMode,
    services: &Services,
) -> Result<Data, String> {
    match (source, image) {
        (DiskSource::Image(format, _), Some(image)) => Ok(Data::Image(*format, image)),
        (DiskSource::Service(Some(service)), _) => {
            let disk = services.disk(service.clone(), mode).await;
            disk.map(Data::Service).map_err(|error| chain(&error))
        }
        (DiskSource::Image(..), None) | (DiskSource::Service(None), _) => Err("none was given".into()),
    }
}

/// A disk as the blocking pool takes it.
struct RequestedDisk {
    index: usize,
    field: &'static str,
    data: Result<Data, String>,
    mode: BlockMode,
    options: BlockOptions,
}

impl RequestedDisk {
    fn new(
        index: usize,
        disk: &BlockConfig,
        data: Result<Data, String>,
        errors: &mpsc::Sender<DeviceError>,
    ) -> Self {
        let errors = errors.clone();
        let options = BlockOptions {
            id: disk.id.clone(),
            read_only: disk.mode == BlockMode::ReadOnly,
            queues: disk.queues,
            rates: Arc::new(rates(disk.limits)),
            // A log that cannot take them all is no reason to keep the device waiting.
            on_error: OnError::new(move |error| drop(errors.try_send(told(error)))),
        };
        Self { index, field: disk.source.field(), data, mode: disk.mode, options }
    }

    fn spec(self) -> Result<VirtioSpec, DiskError> {
        let Self { index, field, data, mode, options } = self;
        let fault = |problem: String| DiskError::Source(source_fault(index, field, problem));
        let image = match data.map_err(fault)? {
            Data::Service(image) => image,
            Data::Image(format, image) => open(image, format, mode).map_err(|error| match error {
                ImageError::NoUring(_) => DiskError::Host(unmade(index, &error)),
                error => fault(chain(&error)),
            })?,
        };
        let image = if mode == BlockMode::VolatileWrite { Overlay::over(image) } else { image };
        let made = Block::spec(name(index), image, options);
        made.map(|(spec, _handle)| spec).map_err(|error| DiskError::Host(unmade(index, &error)))
    }
}

/// Why there is no disk.
enum DiskError {
    /// Its image or service.
    Source(ConfigFault),
    /// The host, which will not make another one either.
    Host(Failure),
}

/// Opens one image after the other, so that of two disks with one image the second is the one that finds it taken.
fn specs(disks: Vec<RequestedDisk>, cancel: &Cancel) -> Result<Vec<VirtioSpec>, Failure> {
    let (mut specs, mut faults) = (Vec::new(), Vec::new());
    for disk in disks {
        if cancel.is_cancelled() {
            return Err(cancelled());
        }
        match disk.spec() {
            Ok(spec) => specs.push(spec),
            Err(DiskError::Source(fault)) => faults.push(fault),
            Err(DiskError::Host(failure)) => return Err(failure),
        }
    }
    refused(&faults).map_or(Ok(specs), Err)
}

fn open(image: OwnedFd, format: ImageFormat, mode: BlockMode) -> Result<DiskImage, ImageError> {
    let writable = mode == BlockMode::ReadWrite;
    let file = ImageFile::lock(image, writable)?;
    match format {
        ImageFormat::Raw => UringDisk::open(file),
        ImageFormat::Qcow2 => Qcow2Disk::open(file, writable),
    }
}

fn name(index: usize) -> String {
    format!("block{index}")
}

fn unmade(index: usize, error: &dyn Error) -> Failure {
    let failure =
        Failure::new(GuestError::DeviceInitializationFailure, format!("block[{index}]: {}", chain(error)));
    failure.of_units(vec![name(index)])
}

/// The limits of a device as a config has them.
pub(super) fn rates(limits: guest_schema::RateLimits) -> RateLimits {
    let guest_schema::RateLimits { bytes_per_second, bytes_burst, operations_per_second, operations_burst } =
        limits;
    RateLimits::new(
        Rate { per_second: bytes_per_second, burst: bytes_burst },
        Rate { per_second: operations_per_second, burst: operations_burst },
    )
}

fn told(error: BlockError) -> DeviceError {
    let BlockError { device, what, error, suppressed } = error;
    DeviceError { device, operation: what.into(), detail: error, suppressed }
}

#[cfg(test)]
mod tests {
    use super::super::{Backends, requested};
    use super::*;
    use crate::events::EventLog;
    use ::devices::virtio::fake_driver::{Buffer, FakeDriver};
    use futures::FutureExt;
    use guest_schema::EventKind;
    use std::fs::{File, OpenOptions};
    use std::os::fd::AsRawFd;
    use std::pin::pin;
    use tokio::runtime::{Builder, Runtime};

    fn disk(id: &str) -> BlockConfig {
        let disk = BlockConfig::raw(FileSource::Descriptor(0), BlockMode::ReadWrite);
        BlockConfig { id: id.into(), ..disk }
    }

    fn problems(disks: &[BlockConfig]) -> Vec<String> {
        faults(disks).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn as_many_disks_as_may_be_are_allowed() {
        let mut disks: Vec<_> = (0..MAX_DISKS).map(|at| disk(&format!("{at:020}"))).collect();
        disks[0] = BlockConfig { queues: MAX_QUEUES, ..disk("") };
        disks[1] = BlockConfig { mode: BlockMode::ReadOnly, ..disk("") };
        disks[2] = BlockConfig { mode: BlockMode::VolatileWrite, ..disk("") };
        assert_eq!(problems(&disks), [""; 0]);
        disks.push(disk("one more"));
        assert_eq!(problems(&disks), ["block: 33 disks are more than 32"]);
    }

    #[test]
    fn every_fault_is_named() {
        let disks = [
            disk("a"),
            BlockConfig { queues: 0, source: DiskSource::Image(ImageFormat::Raw, None), ..disk("a") },
            BlockConfig { queues: 17, ..disk("äääääääääää") },
            BlockConfig { source: DiskSource::Image(ImageFormat::Qcow2, None), ..disk("b") },
            BlockConfig { source: DiskSource::Service(None), ..disk("c") },
        ];
        assert_eq!(
            problems(&disks),
            [
                "block[1].id: \"a\" is another disk's",
                "block[1].queues: 0 is not from 1 to 16",
                "block[1].format.file: none was given",
                "block[2].id: the 22 bytes of \"äääääääääää\" are more than 20",
                "block[2].queues: 17 is not from 1 to 16",
                "block[3].format.qcow2: none was given",
                "block[4].format.service: none was given",
            ]
        );
    }

    fn image_of(bytes: u64) -> File {
        let file: File =
            rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd").into();
        file.set_len(bytes).expect("room");
        file
    }

    /// As another process would open it.
    fn again(file: &File) -> OwnedFd {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        OpenOptions::new().read(true).write(true).open(path).expect("there").into()
    }

    /// The devices of a guest with these disks, each over one of the images.
    async fn made(
        disks: Vec<BlockConfig>,
        images: Vec<Option<OwnedFd>>,
        cancel: &Cancel,
    ) -> Result<RequestedDevices, Failure> {
        let mut config = crate::config::tests::config();
        config.devices.block = disks;
        requested(&config, Backends { images, ..Backends::default() }, cancel).await
    }

    fn devices(disks: Vec<BlockConfig>, images: Vec<Option<OwnedFd>>) -> Result<RequestedDevices, Failure> {
        pool_of_one().block_on(made(disks, images, &Cancel::default()))
    }

    fn pool_of_one() -> Runtime {
        Builder::new_current_thread().enable_time().max_blocking_threads(1).build().expect("a runtime")
    }

    /// Keeps the one thread of the pool until it is dropped. What it is given meanwhile waits, as behind a slow file system.
    struct Busy(#[expect(dead_code, reason = "its end is what counts")] std::sync::mpsc::Sender<()>);

    impl Busy {
        fn keep() -> Self {
            let (sender, released) = std::sync::mpsc::channel();
            tokio::task::spawn_blocking(move || released.recv());
            Self(sender)
        }
    }

    /// Once the pool has done what it was given.
    async fn idle() {
        tokio::task::spawn_blocking(|| ()).await.expect("no panic");
    }

    fn is_free(file: &File) -> bool {
        ImageFile::lock(again(file), true).is_ok()
    }

    fn refused_with(disks: Vec<BlockConfig>, images: Vec<Option<OwnedFd>>) -> Failure {
        devices(disks, images).err().expect("refused")
    }

    #[test]
    fn an_image_that_another_guest_writes_is_refused_and_one_that_is_read_is_shared() {
        let file = image_of(4096);
        let with = |mode| vec![BlockConfig { mode, ..disk("") }];
        let image = || vec![Some(again(&file))];
        let writer = devices(with(BlockMode::ReadWrite), image()).expect("free");
        for (mode, held) in [
            (BlockMode::ReadWrite, "a lock on it"),
            (BlockMode::ReadOnly, "it for writing"),
            (BlockMode::VolatileWrite, "it for writing"),
        ] {
            let failure = refused_with(with(mode), image());
            assert_eq!(failure.code, GuestError::BadConfig);
            let problem =
                format!("block[0].format.file: it is in use: another process or guest holds {held}");
            assert!(failure.detail.contains(&problem), "{failure:?}");
        }
        drop(writer);
        let _readers = [BlockMode::VolatileWrite, BlockMode::VolatileWrite, BlockMode::ReadOnly]
            .map(|mode| devices(with(mode), image()).expect("shared"));
        assert!(refused_with(with(BlockMode::ReadWrite), image()).detail.contains("a lock on it"));
    }

    #[test]
    fn every_image_that_is_none_is_named_by_its_field() {
        let disks =
            vec![disk("a"), BlockConfig { source: DiskSource::Image(ImageFormat::Qcow2, None), ..disk("b") }];
        let images = [100, 4096].map(|bytes| Some(image_of(bytes).into())).into();
        let failure = refused_with(disks, images);
        for problem in [
            "block[0].format.file: its 100 bytes are less than a sector of 512",
            "block[1].format.qcow2: it is no qcow2 image that can be used: its first bytes are not those of one",
        ] {
            assert!(failure.detail.contains(problem), "{failure:?}");
        }
    }

    #[test]
    fn images_are_opened_beside_the_thread_that_waits() {
        pool_of_one().block_on(async {
            let (file, busy, cancel) = (image_of(4096), Busy::keep(), Cancel::default());
            let mut making = pin!(made(vec![disk("")], vec![Some(again(&file))], &cancel));
            assert!(futures::poll!(&mut making).is_pending());
            assert!(is_free(&file), "nothing is opened here");
            drop(busy);
            let devices = making.await.expect("an image");
            assert!(!is_free(&file));
            drop(devices);
            assert!(is_free(&file));
        });
    }

    #[test]
    fn a_create_that_is_cancelled_leaves_its_images_free() {
        pool_of_one().block_on(async {
            let (file, busy, cancel) = (image_of(4096), Busy::keep(), Cancel::default());
            let mut making = pin!(made(vec![disk("")], vec![Some(again(&file))], &cancel));
            assert!(futures::poll!(&mut making).is_pending());
            cancel.cancel();
            assert!(futures::poll!(&mut making).is_pending(), "what is under way is waited for");
            drop(busy);
            let failure = making.await.err().expect("cancelled");
            assert_eq!(failure.code, GuestError::ControllerForcedHalt);
            assert!(is_free(&file));
        });
    }

    #[test]
    fn a_create_that_is_cancelled_does_not_wait_for_ever() {
        pool_of_one().block_on(async {
            let (file, busy, cancel) = (image_of(4096), Busy::keep(), Cancel::default());
            tokio::time::pause();
            let making = made(vec![disk("")], vec![Some(again(&file))], &cancel);
            cancel.cancel();
            let mut making = pin!(making);
            assert!(futures::poll!(&mut making).is_pending());
            tokio::time::advance(2 * LAST_IMAGE).await;
            let failure = making.await.err().expect("cancelled");
            assert_eq!(failure.code, GuestError::ControllerForcedHalt);
            drop(busy);
            idle().await;
            assert!(is_free(&file));
        });
    }

    #[test]
    fn a_create_that_is_dropped_leaves_its_images_free() {
        pool_of_one().block_on(async {
            let (file, busy, cancel) = (image_of(4096), Busy::keep(), Cancel::default());
            {
                let mut making = pin!(made(vec![disk("")], vec![Some(again(&file))], &cancel));
                assert!(futures::poll!(&mut making).is_pending());
            }
            drop(busy);
            idle().await;
            assert!(is_free(&file));
        });
    }

    #[test]
    fn a_failure_of_the_host_is_an_event_of_the_guest() {
        let file = image_of(4096);
        let mut devices = devices(vec![disk("")], vec![Some(again(&file))]).expect("an image");
        let mut driver = FakeDriver::ready(devices.specs.remove(0), 0);
        file.set_len(0).expect("cut off");
        let reply = driver.request(0, &[Buffer::Out(&[0; 16]), Buffer::In(512), Buffer::In(1)]);
        assert_eq!(reply.data.last(), Some(&1), "an I/O error");
        drop((driver, devices.told));
        let events = EventLog::default();
        events.device_errors(devices.errors).now_or_never().expect("the devices are gone");
        let event = events.next(&mut 0).now_or_never().flatten().expect("an event");
        let EventKind::DeviceError(error) = event.kind else { panic!("{event:?}") };
        assert_eq!((&error.device[..], &error.operation[..], error.suppressed), ("block0", "read", 0));
        assert!(!error.detail.is_empty());
    }
}
