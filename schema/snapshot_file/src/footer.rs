//! The footer: the last 64 bytes of a file.

use crate::FORMAT;
use crate::checksum::Checksum;
use crate::error::OpenError;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use twox_hash::XxHash3_64;

pub(crate) const FOOTER: usize = 64;

const MAGIC: [u8; 16] = *b"guestd snapshot\n";
const PART: &str = "footer";

/// Where the manifest is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Footer {
    pub manifest: Range<u64>,
    pub checksum: Checksum,
}

impl Footer {
    pub fn encode(&self) -> [u8; FOOTER] {
        let Self { manifest, checksum } = self;
        let mut bytes = [0; FOOTER];
        bytes[..16].copy_from_slice(&MAGIC);
        bytes[16..20].copy_from_slice(&FORMAT.to_le_bytes());
        bytes[24..32].copy_from_slice(&manifest.start.to_le_bytes());
        bytes[32..40].copy_from_slice(&(manifest.end - manifest.start).to_le_bytes());
        bytes[40..56].copy_from_slice(checksum.bytes());
        let sum = XxHash3_64::oneshot(&bytes[..56]);
        bytes[56..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// That of a file of so many bytes.
    pub fn read(file: &File, bytes: u64) -> Result<Self, OpenError> {
        let Some((footer, at)) = read_last(file, bytes).map_err(OpenError::read(PART))? else {
            return Err(OpenError::NotASnapshot { bytes });
        };
        let sum = XxHash3_64::oneshot(&footer[..56]);
        if sum != number(&footer, 56) {
            let problem = format!("{:016x}, and that of the footer is {sum:016x}", number(&footer, 56));
            return Err(OpenError::field(PART, "checksum", problem));
        }
        let format = u32::from_le_bytes(footer[16..20].try_into().expect("4 bytes"));
        if format != FORMAT {
            return Err(OpenError::Format { format, known: FORMAT });
        }
        let (start, length) = (number(&footer, 24), number(&footer, 32));
        if start.checked_add(length) != Some(at) {
            let problem = format!("{length} bytes at {start} do not end at {at}, where the footer begins");
            return Err(OpenError::field(PART, "manifest", problem));
        }
        let checksum = Checksum::noted(&footer[40..56]).expect("16 bytes");
        Ok(Self { manifest: start..at, checksum })
    }
}

fn number(footer: &[u8; FOOTER], at: usize) -> u64 {
    u64::from_le_bytes(footer[at..at + 8].try_into().expect("8 bytes"))
}

/// The footer and where it begins, if the file ends with one.
fn read_last(file: &File, bytes: u64) -> io::Result<Option<([u8; FOOTER], u64)>> {
    let Some(at) = bytes.checked_sub(FOOTER as u64) else { return Ok(None) };
    let mut footer = [0; FOOTER];
    file.read_exact_at(&mut footer, at)?;
    Ok(footer.starts_with(&MAGIC).then_some((footer, at)))
}

/// Whether a file ends as that of a snapshot does. No more of it is looked at.
///
/// # Errors
/// If it cannot be read.
pub fn is_snapshot_file(file: &File) -> io::Result<bool> {
    Ok(read_last(file, file.metadata()?.len())?.is_some())
}
