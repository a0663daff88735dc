//! Disks of a guest's config.

use crate::block_capnp::{block_service, block_service_info};
use crate::config::{read_file, utf8, write_file};
use crate::config_capnp as wire;
use crate::{ConfigFault, FileSource};
use capnp::struct_list;
use std::fmt;

/// The most bytes that one read or write of a block service moves.
pub const MAX_BLOCK_TRANSFER: u32 = 256 << 10;

/// What becomes of writes to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BlockMode {
    /// They reach the image.
    #[default]
    ReadWrite,
    /// They fail.
    ReadOnly,
    /// They stay in the VMM's memory and end with the guest.
    VolatileWrite,
}

/// How a disk's image keeps its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ImageFormat {
    /// As it is: the file's bytes are the disk's.
    #[default]
    Raw,
    /// As QEMU's format has it, version 2 or 3.
    Qcow2,
}

/// Where a disk's data is.
#[derive(Clone)]
pub enum DiskSource {
    /// In an image: a descriptor.
    Image(ImageFormat, Option<FileSource>),
    /// Where a client keeps it.
    Service(Option<block_service::Client>),
}

/// A capability has nothing to show.
impl fmt::Debug for DiskSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(format, image) => f.debug_tuple("Image").field(format).field(image).finish(),
            Self::Service(service) => f.debug_tuple("Service").field(&service.is_some()).finish(),
        }
    }
}

impl DiskSource {
    /// The field of `BlockConfig` in which it is.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Image(format, _) => format.field(),
            Self::Service(_) => "format.service",
        }
    }

    /// Whether anything was given.
    pub fn is_given(&self) -> bool {
        match self {
            Self::Image(_, image) => image.is_some(),
            Self::Service(service) => service.is_some(),
        }
    }
}

impl ImageFormat {
    fn field(self) -> &'static str {
        match self {
            Self::Raw => "format.file",
            Self::Qcow2 => "format.qcow2",
        }
    }
}

/// What a block service says of its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockServiceInfo {
    /// Its size: a sector of 512 at least; a rest of one is left out.
    pub bytes: u64,
    /// The block that is written without reading around it: a power of two from 512 to 64 KiB.
    pub block_bytes: u32,
    /// It takes no writes.
    pub read_only: bool,
}

impl BlockServiceInfo {
    /// As it is on the wire.
    pub fn read(reader: block_service_info::Reader<'_>) -> Self {
        Self {
            bytes: reader.get_bytes(),
            block_bytes: reader.get_block_bytes(),
            read_only: reader.get_read_only(),
        }
    }

    /// The same onto the wire.
    pub fn write(self, mut builder: block_service_info::Builder<'_>) {
        let Self { bytes, block_bytes, read_only } = self;
        builder.set_bytes(bytes);
        builder.set_block_bytes(block_bytes);
        builder.set_read_only(read_only);
    }
}

/// How much a device may do. 0 a second is no limit; a burst of 0 is what comes in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "their names say it")]
pub struct RateLimits {
    pub bytes_per_second: u64,
    pub bytes_burst: u64,
    pub operations_per_second: u64,
    pub operations_burst: u64,
}

/// A disk.
#[derive(Debug, Clone)]
pub struct BlockConfig {
    /// What the guest reads as its serial number: at most 20 bytes, unique unless it is empty.
    pub id: String,
    /// What becomes of writes.
    pub mode: BlockMode,
    /// Where its data is.
    pub source: DiskSource,
    /// How much the guest may do with it.
    pub limits: RateLimits,
    /// How many virtqueues: 1 to 16.
    pub queues: u16,
}

impl BlockConfig {
    /// A disk without limits, with an empty id and one queue.
    pub fn new(source: DiskSource, mode: BlockMode) -> Self {
        Self { id: String::new(), mode, source, limits: RateLimits::default(), queues: 1 }
    }

    /// The same over a raw image.
    pub fn raw(image: FileSource, mode: BlockMode) -> Self {
        Self::new(DiskSource::Image(ImageFormat::Raw, Some(image)), mode)
    }

    pub(crate) fn read_all(
        disks: struct_list::Reader<'_, wire::block_config::Owned>,
        faults: &mut Vec<ConfigFault>,
    ) -> capnp::Result<Vec<Self>> {
        disks.iter().enumerate().map(|(index, disk)| Self::read(disk, index, faults)).collect()
    }

    fn read(
        reader: wire::block_config::Reader<'_>,
        index: usize,
        faults: &mut Vec<ConfigFault>,
    ) -> capnp::Result<Self> {
        let field = |name: &str| format!("block[{index}].{name}");
        let mode = match reader.get_mode() {
            Ok(wire::BlockMode::ReadWrite) => BlockMode::ReadWrite,
            Ok(wire::BlockMode::ReadOnly) => BlockMode::ReadOnly,
            Ok(wire::BlockMode::VolatileWrite) => BlockMode::VolatileWrite,
            Err(unknown) => {
                faults.push(ConfigFault::new(field("mode"), format!("unknown value {}", unknown.0)));
                BlockMode::default()
            }
        };
        let mut read = |format: ImageFormat, file| {
            read_file(file, &field(format.field()), faults).map(|image| DiskSource::Image(format, image))
        };
        let source = match reader.get_format().which() {
            Ok(wire::block_config::format::File(file)) => read(ImageFormat::Raw, file?)?,
            Ok(wire::block_config::format::Qcow2(file)) => read(ImageFormat::Qcow2, file?)?,
            Ok(wire::block_config::format::Service(service)) => {
                DiskSource::Service(if reader.get_format().has_service() { Some(service?) } else { None })
            }
            Err(unknown) => {
                faults.push(ConfigFault::new(field("format"), format!("unknown kind {}", unknown.0)));
                DiskSource::Image(ImageFormat::Raw, None)
            }
        };
        let id = utf8(reader.get_id()?, &field("id"), faults);
        let limits = RateLimits::read(reader.get_limits()?);
        Ok(Self { id, mode, source, limits, queues: reader.get_queues() })
    }

    pub(crate) fn write_all<'a>(
        disks: &[Self],
        init: impl FnOnce(u32) -> struct_list::Builder<'a, wire::block_config::Owned>,
    ) {
        let mut list = init(u32::try_from(disks.len()).expect("a list of 32 bits' length"));
        for (index, disk) in (0..).zip(disks) {
            disk.write(list.reborrow().get(index));
        }
    }

    fn write(&self, mut builder: wire::block_config::Builder<'_>) {
        let Self { id, mode, source, limits, queues } = self;
        builder.set_id(&id[..]);
        builder.set_mode(match mode {
            BlockMode::ReadWrite => wire::BlockMode::ReadWrite,
            BlockMode::ReadOnly => wire::BlockMode::ReadOnly,
            BlockMode::VolatileWrite => wire::BlockMode::VolatileWrite,
        });
        let mut format = builder.reborrow().get_format();
        match source {
            DiskSource::Image(ImageFormat::Raw, image) => write_file(image.as_ref(), format.init_file()),
            DiskSource::Image(ImageFormat::Qcow2, image) => write_file(image.as_ref(), format.init_qcow2()),
            DiskSource::Service(Some(service)) => format.set_service(service.clone()),
            DiskSource::Service(None) => {}
        }
        limits.write(builder.reborrow().init_limits());
        builder.set_queues(*queues);
    }
}

impl RateLimits {
    pub(crate) fn read(reader: wire::rate_limits::Reader<'_>) -> Self {
        Self {
            bytes_per_second: reader.get_bytes_per_second(),
            bytes_burst: reader.get_bytes_burst(),
            operations_per_second: reader.get_operations_per_second(),
            operations_burst: reader.get_operations_burst(),
        }
    }

    pub(crate) fn write(self, mut builder: wire::rate_limits::Builder<'_>) {
        let Self { bytes_per_second, bytes_burst, operations_per_second, operations_burst } = self;
        builder.set_bytes_per_second(bytes_per_second);
        builder.set_bytes_burst(bytes_burst);
        builder.set_operations_per_second(operations_per_second);
        builder.set_operations_burst(operations_burst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(fill: impl FnOnce(wire::guest_config::Builder<'_>)) -> (Vec<BlockConfig>, Vec<String>) {
        let mut message = capnp::message::Builder::new_default();
        fill(message.init_root());
        let reader: wire::guest_config::Reader<'_> = message.get_root_as_reader().expect("a config");
        let mut faults = Vec::new();
        let disks = BlockConfig::read_all(reader.get_block().expect("a list"), &mut faults);
        (disks.expect("readable"), faults.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn disks_survive_the_wire() {
        let limits = RateLimits {
            bytes_per_second: 1,
            bytes_burst: 2,
            operations_per_second: 3,
            operations_burst: u64::MAX,
        };
        let disks = [BlockMode::ReadWrite, BlockMode::ReadOnly, BlockMode::VolatileWrite].map(|mode| {
            BlockConfig { id: format!("{mode:?}"), limits, queues: 4, ..BlockConfig::new(source(mode), mode) }
        });
        let (again, faults) =
            read(|mut builder| BlockConfig::write_all(&disks, |count| builder.reborrow().init_block(count)));
        assert!(faults.is_empty(), "{faults:?}");
        assert_eq!(format!("{again:?}"), format!("{disks:?}"));
    }

    fn source(mode: BlockMode) -> DiskSource {
        let format = if mode == BlockMode::ReadOnly { ImageFormat::Qcow2 } else { ImageFormat::Raw };
        DiskSource::Image(format, Some(FileSource::Descriptor(7)))
    }
}
