//! A request on a block device's queue (VIRTIO 1.3, 5.2.6), read and checked.

use super::disk::Operation;
use crate::virtio::{Buffers, Chain, DeviceFault};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{GuestMemoryMmap, Le32, Le64};

/// A sector, in bytes: the unit of every position, whatever the disk's blocks are.
pub(super) const SECTOR: u64 = 512;

/// How long a device's id is, padded with zeros.
pub(super) const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// The most sectors that one discard names: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// The most sectors that one request makes zeros: 16 MiB, since a host may have to write them.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 15;

const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;

/// How a request ends that no disk has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Refused {
    /// It cannot be done, or is wrong.
    IoError = VIRTIO_BLK_S_IOERR,
    /// The device does not do such things.
    Unsupported = VIRTIO_BLK_S_UNSUPP,
}

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Of(Operation),
    /// The device's id, into these buffers.
    Id(Buffers),
    Refused(Refused),
}

/// A request, its buffers taken apart.
#[derive(Debug)]
pub(super) struct Request {
    /// To be given back.
    pub chain: Chain,
    pub asked: Asked,
    /// Where its end is written: the last writable byte.
    pub status: Buffers,
    /// How many bytes are written into its other writable buffers if all goes well.
    pub writes: u32,
    /// What it costs.
    pub bytes: u64,
}

/// What a request may ask for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub sectors: u64,
    pub read_only: bool,
    /// Writes end only once they are durable: there is nothing to flush.
    pub write_through: bool,
}

impl Request {
    /// Takes a chain apart.
    ///
    /// # Errors
    /// If the driver cannot even be told that it is wrong: there is no header, or no byte for the status.
    pub fn read(mut chain: Chain, limits: Limits, memory: &GuestMemoryMmap) -> Result<Self, DeviceFault> {
        let header = chain.readable.split_front(HEADER_BYTES);
        let status = chain.writable.split_back(1);
        if header.bytes() < HEADER_BYTES || status.is_empty() {
            let problem = "a request without a header of 16 bytes and a byte for its status";
            return Err(DeviceFault::Driver(problem.into()));
        }
        let not_there = |error| DeviceFault::Driver(format!("a request's header: {error}"));
        let mut reader = header.reader(memory).map_err(not_there)?;
        let (kind, _, sector) = (
            reader.read_obj::<Le32>().map_or(u32::MAX, Le32::to_native),
            reader.read_obj::<Le32>(),
            reader.read_obj::<Le64>().map_or(u64::MAX, Le64::to_native),
        );
        let (readable, writable) = (std::mem::take(&mut chain.readable), std::mem::take(&mut chain.writable));
        let data = Data { readable, writable, limits };
        let asked = data.asked(kind, sector, memory).unwrap_or_else(Asked::Refused);
        let (writes, bytes) = match &asked {
            Asked::Of(Operation::Read { buffers, .. }) => (buffers.bytes(), buffers.bytes()),
            Asked::Of(Operation::Write { buffers, .. }) => (0, buffers.bytes()),
            Asked::Id(buffers) => (buffers.bytes().min(ID_BYTES as u64), 0),
            _ => (0, 0),
        };
        let writes = u32::try_from(writes).expect("a chain is shorter than 4 GiB");
        Ok(Self { chain, asked, status, writes, bytes })
    }
}

/// What is between a request's header and its status.
struct Data {
    readable: Buffers,
    writable: Buffers,
    limits: Limits,
}

impl Data {
    fn asked(self, kind: u32, sector: u64, memory: &GuestMemoryMmap) -> Result<Asked, Refused> {
        let write_through = self.limits.write_through;
        Ok(Asked::Of(match kind {
            VIRTIO_BLK_T_IN => {
                let offset = self.limits.offset(sector, self.writable.bytes())?;
                Operation::Read { offset, buffers: self.writable }
            }
            VIRTIO_BLK_T_OUT => {
                self.limits.may_write()?;
                let offset = self.limits.offset(sector, self.readable.bytes())?;
                Operation::Write { offset, buffers: self.readable, durable: write_through }
            }
            VIRTIO_BLK_T_FLUSH => Operation::Flush,
            VIRTIO_BLK_T_GET_ID => return Ok(Asked::Id(self.writable)),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => return self.range(kind, memory),
            _ => return Err(Refused::Unsupported),
        }))
    }

    /// The one range (5.2.6, virtio_blk_discard_write_zeroes) of a discard or a write of zeros.
    fn range(&self, kind: u32, memory: &GuestMemoryMmap) -> Result<Asked, Refused> {
        self.limits.may_write()?;
        if self.readable.bytes() != RANGE_BYTES {
            return Err(Refused::IoError);
        }
        let mut reader = self.readable.reader(memory).map_err(|_| Refused::IoError)?;
        let sector = reader.read_obj::<Le64>().ok_or(Refused::IoError)?.to_native();
        let sectors = reader.read_obj::<Le32>().ok_or(Refused::IoError)?.to_native();
        let flags = reader.read_obj::<Le32>().ok_or(Refused::IoError)?.to_native();
        let discards = kind == VIRTIO_BLK_T_DISCARD;
        let (defined, most) = match discards {
            true => (0, MAX_DISCARD_SECTORS),
            false => (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, MAX_WRITE_ZEROES_SECTORS),
        };
        if flags & !defined != 0 {
            return Err(Refused::Unsupported);
        }
        if sectors > most {
            return Err(Refused::IoError);
        }
        let bytes = u64::from(sectors) * SECTOR;
        let offset = self.limits.offset(sector, bytes)?;
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        Ok(Asked::Of(match discards {
            true => Operation::Discard { offset, bytes },
            false => Operation::WriteZeroes { offset, bytes, unmap, durable: self.limits.write_through },
        }))
    }
}

impl Limits {
    fn may_write(self) -> Result<(), Refused> {
        if self.read_only { Err(Refused::IoError) } else { Ok(()) }
    }

    /// Where a range is that has at least one sector, only whole ones, and those on the disk.
    fn offset(self, sector: u64, bytes: u64) -> Result<u64, Refused> {
        let whole = bytes > 0 && bytes.is_multiple_of(SECTOR);
        let end = sector.checked_add(bytes / SECTOR);
        let inside = end.is_some_and(|end| end <= self.sectors);
        if whole && inside { Ok(sector * SECTOR) } else { Err(Refused::IoError) }
    }
}
