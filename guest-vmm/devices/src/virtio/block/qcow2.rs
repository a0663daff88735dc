//! An image in the qcow2 format, versions 2 and 3.
//!
//! Limits: the image has to be complete in its file, without a backing file or a file for its data, since no path is opened on an
//! image's word; not encrypted; no file that is marked as dirty or corrupt, which `qemu-img check -r all` repairs; one operation at a
//! time; the size is that at create.

use super::blocking::{BlockingDisk, BlockingImage};
use super::disk::DiskImage;
use super::file::{ImageError, ImageFile};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::sync::Arc;

/// The first bytes of an image, up to and with `crypt_method`.
const HEADER: usize = 36;
const MAGIC: [u8; 4] = *b"QFI\xfb";

/// A qcow2 image.
#[derive(Debug)]
pub struct Qcow2Disk {
    image: FormatAccess<File>,
    /// Keeps the lock.
    _file: ImageFile,
}

impl Qcow2Disk {
    /// The image in this file, to be written or only to be read.
    ///
    /// # Errors
    /// [`ImageError::Qcow2`] if it cannot be one, [`ImageError::Empty`] if it has not one sector.
    pub fn open(file: ImageFile, writable: bool) -> Result<DiskImage, ImageError> {
        check_header(&file)?;
        let physical_block_bytes = file.physical_block_bytes();
        let storage = std::fs::File::from(file.as_fd().try_clone_to_owned()?);
        let image = open(storage, writable)?;
        let bytes = match image.size() {
            bytes @ 0..512 => return Err(ImageError::Empty(bytes)),
            bytes => bytes,
        };
        let disk = BlockingDisk::spawn("qcow2", Self { image, _file: file })?;
        Ok(DiskImage { disk: Box::new(disk), size: Arc::new(bytes), physical_block_bytes })
    }
}

/// What the library does not look at.
fn check_header(file: &ImageFile) -> Result<(), ImageError> {
    let mut header = [0; HEADER];
    let read = rustix::io::pread(file, &mut header, 0)?;
    if read < HEADER || header[..4] != MAGIC {
        return Err(ImageError::Qcow2("its first bytes are not those of one".into()));
    }
    match u32::from_be_bytes([header[32], header[33], header[34], header[35]]) {
        0 => Ok(()),
        method => Err(ImageError::Qcow2(format!("it is encrypted (crypt_method {method})"))),
    }
}

fn open(storage: std::fs::File, writable: bool) -> Result<FormatAccess<File>, ImageError> {
    let refused = |error: io::Error| ImageError::Qcow2(error.to_string());
    let builder = Qcow2::<File>::builder(File::try_from(storage)?).write(writable);
    let image =
        builder.backing(None).data_file(None).open(DenyImplicitOpenGate::default()).map_err(refused)?;
    if let Some(name) = image.implicit_backing_file() {
        let problem = format!(
            "it needs the backing file {name:?}, which is not opened: `qemu-img rebase -b \"\"` does without"
        );
        return Err(ImageError::Qcow2(problem));
    }
    if image.requires_external_data_file() {
        return Err(ImageError::Qcow2("its data is in another file, which is not opened".into()));
    }
    Ok(FormatAccess::new(image))
}

impl BlockingImage for Qcow2Disk {
    fn read(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.image.read(to, offset)
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.image.write(from, offset)
    }

    fn zero(&mut self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        if unmap { self.image.discard_to_zero(offset, bytes) } else { self.image.write_zeroes(offset, bytes) }
    }

    fn discard(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        match self.image.discard_to_any(offset, bytes) {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.image.flush()
    }

    fn sync(&mut self) -> io::Result<()> {
        self.image.sync()
    }
}
