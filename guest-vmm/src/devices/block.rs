//! Disks.

use super::RequestedDevices;
use crate::config::refused;
use ::devices::virtio::VirtioSpec;
use ::devices::virtio::block::{
    Block, BlockError, BlockOptions, DiskImage, ImageError, ImageFile, MAX_QUEUES, OnError, Overlay,
    Qcow2Disk, UringDisk,
};
use ::devices::virtio::rate_limit::{Rate, RateLimits};
use guest_schema::{
    BlockConfig, BlockMode, ConfigFault, DeviceError, Failure, FileSource, GuestError, ImageFormat, chain,
};
use guest_transport::Descriptors;
use std::collections::HashSet;
use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio::sync::mpsc;

/// The most disks of a guest.
const MAX_DISKS: usize = 32;
/// The longest id, in bytes.
const MAX_ID: usize = 20;

/// Takes the disks' images from the channel on which their config came.
pub(crate) fn take_images(
    disks: &[BlockConfig],
    descriptors: &Descriptors,
    faults: &mut Vec<ConfigFault>,
) -> Vec<Option<OwnedFd>> {
    let mut take = |(index, disk): (usize, &BlockConfig)| {
        let taken = match disk.image.as_ref()? {
            FileSource::Descriptor(number) => descriptors.take(*number).map_err(|error| error.to_string()),
            FileSource::File(_) => {
                Err("a disk's image has to be a descriptor, which a proxied channel does not pass".into())
            }
        };
        taken.map_err(|problem| faults.push(image_fault(index, disk, problem))).ok()
    };
    disks.iter().enumerate().map(&mut take).collect()
}

fn image_fault(index: usize, disk: &BlockConfig, problem: impl Into<String>) -> ConfigFault {
    ConfigFault::new(format!("block[{index}].{}", disk.format.field()), problem)
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
        if disk.image.is_none() {
            fault(disk.format.field(), "none was given".into());
        }
    }
    faults
}

/// Adds the disks. Whatever is wrong with an image is a fault; all of them are in one failure.
pub(super) fn add(
    disks: &[BlockConfig],
    images: Vec<Option<OwnedFd>>,
    devices: &mut RequestedDevices,
) -> Result<(), Failure> {
    let mut faults = Vec::new();
    for (index, (disk, image)) in disks.iter().zip(images).enumerate() {
        match image.map(|image| open(image, disk)) {
            Some(Ok(image)) => {
                let spec = spec(index, disk, image, &devices.told)?;
                devices.specs.push(spec);
            }
            Some(Err(error @ ImageError::NoUring(_))) => return Err(unmade(index, &error)),
            Some(Err(error)) => faults.push(image_fault(index, disk, chain(&error))),
            None => faults.push(image_fault(index, disk, "none was given")),
        }
    }
    refused(&faults).map_or(Ok(()), Err)
}

fn open(image: OwnedFd, disk: &BlockConfig) -> Result<DiskImage, ImageError> {
    let writable = disk.mode == BlockMode::ReadWrite;
    let file = ImageFile::lock(image, writable)?;
    let image = match disk.format {
        ImageFormat::Raw => UringDisk::open(file)?,
        ImageFormat::Qcow2 => Qcow2Disk::open(file, writable)?,
    };
    Ok(if disk.mode == BlockMode::VolatileWrite { Overlay::over(image) } else { image })
}

fn name(index: usize) -> String {
    format!("block{index}")
}

fn spec(
    index: usize,
    disk: &BlockConfig,
    image: DiskImage,
    errors: &mpsc::Sender<DeviceError>,
) -> Result<VirtioSpec, Failure> {
    let errors = errors.clone();
    let options = BlockOptions {
        id: disk.id.clone(),
        read_only: disk.mode == BlockMode::ReadOnly,
        queues: disk.queues,
        rates: Arc::new(rates(disk.limits)),
        // A log that cannot take them all is no reason to keep the device waiting.
        on_error: OnError::new(move |error| drop(errors.try_send(told(error)))),
    };
    let (spec, _handle) = Block::spec(name(index), image, options).map_err(|error| unmade(index, &error))?;
    Ok(spec)
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
            BlockConfig { queues: 0, image: None, ..disk("a") },
            BlockConfig { queues: 17, ..disk("äääääääääää") },
            BlockConfig { format: ImageFormat::Qcow2, image: None, ..disk("b") },
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
    fn devices(disks: Vec<BlockConfig>, images: Vec<Option<OwnedFd>>) -> Result<RequestedDevices, Failure> {
        let mut config = crate::config::tests::config();
        config.devices.block = disks;
        let requested = requested(&config, Backends { images, ..Backends::default() });
        requested.now_or_never().expect("disks are waited for by nobody")
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
        let disks = vec![disk("a"), BlockConfig { format: ImageFormat::Qcow2, ..disk("b") }];
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
