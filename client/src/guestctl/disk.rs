//! Disks as the command line takes them: `path=FILE[,KEY=VALUE]…`.

use crate::ending::{Outcome, Trouble};
use crate::pairs::{LIMITS, Pairs};
use guest_client::{BlockConfig, BlockMode, ImageFormat, Lifecycle, RateLimits};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

const KEYS: [&str; 6] = ["path", "id", "readonly", "volatile", "format", "queues"];

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The image.
    path: PathBuf,
    id: String,
    mode: BlockMode,
    format: ImageFormat,
    limits: RateLimits,
    queues: u16,
}

/// Reads one `--disk`.
pub fn parse(text: &str) -> Result<Disk, String> {
    let pairs = Pairs::read(text, &[&KEYS[..], &LIMITS].concat())?;
    let path = pairs.text("path").filter(|path| !path.is_empty()).ok_or("path=FILE is missing")?;
    let limits = pairs.limits()?;
    Ok(Disk {
        path: path.into(),
        id: pairs.text("id").unwrap_or_default().to_owned(),
        mode: mode(pairs.switch("readonly")?, pairs.switch("volatile")?)?,
        format: pairs.text("format").map_or(Ok(ImageFormat::Raw), format)?,
        limits,
        queues: pairs.number("queues")?.unwrap_or(1),
    })
}

fn mode(readonly: bool, volatile: bool) -> Result<BlockMode, String> {
    match (readonly, volatile) {
        (true, true) => Err("volatile: a disk that is readonly has no writes to keep".into()),
        (true, false) => Ok(BlockMode::ReadOnly),
        (false, true) => Ok(BlockMode::VolatileWrite),
        (false, false) => Ok(BlockMode::ReadWrite),
    }
}

fn format(value: &str) -> Result<ImageFormat, String> {
    match value {
        "raw" => Ok(ImageFormat::Raw),
        "qcow2" => Ok(ImageFormat::Qcow2),
        _ => Err(format!("format: {value:?} is none of raw, qcow2")),
    }
}

/// A disk whose image is open.
#[derive(Debug)]
pub struct OpenDisk {
    disk: Disk,
    image: File,
}

impl Disk {
    /// The image.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the guest writes to the image.
    pub fn is_written(&self) -> bool {
        self.mode == BlockMode::ReadWrite
    }

    /// Opens the image with the user's own rights: for writing only if the guest may.
    pub fn open(&self) -> Outcome<OpenDisk> {
        let mut options = OpenOptions::new();
        options.read(true).write(self.is_written());
        let image = options.open(&self.path).map_err(|error| unusable(&self.path, &error))?;
        Ok(OpenDisk { disk: self.clone(), image })
    }
}

fn unusable(path: &Path, error: &io::Error) -> Trouble {
    Trouble::Usage(format!("--disk path={}: {error}", path.display()))
}

impl OpenDisk {
    /// The disk as part of a config.
    pub fn config(self, lifecycle: &Lifecycle) -> Outcome<BlockConfig> {
        let Disk { path, id, mode, format, limits, queues } = self.disk;
        let source = lifecycle.image(self.image, format, mode);
        let source = source.map_err(|error| unusable(&path, &error))?;
        Ok(BlockConfig { id, limits, queues, ..BlockConfig::new(source, mode) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_path_and_more() {
        let disk = parse("path=/a b/c.img").expect("valid");
        assert_eq!(
            (disk.path.to_str(), disk.mode, disk.queues),
            (Some("/a b/c.img"), BlockMode::ReadWrite, 1)
        );
        assert_eq!(disk.limits, RateLimits::default());
        let disk = parse(
            "id=root,path=x,readonly=on,format=raw,bps=10M,iops=1000,iops-burst=5,bps-burst=1G,queues=2",
        );
        let limits = RateLimits {
            bytes_per_second: 10 << 20,
            bytes_burst: 1 << 30,
            operations_per_second: 1000,
            operations_burst: 5,
        };
        let expected = Disk {
            path: "x".into(),
            id: "root".into(),
            mode: BlockMode::ReadOnly,
            format: ImageFormat::Raw,
            limits,
            queues: 2,
        };
        assert_eq!(disk, Ok(expected));
        let formats =
            ["", ",format=raw", ",format=qcow2"].map(|key| parse(&format!("path=x{key}")).expect(key).format);
        assert_eq!(formats, [ImageFormat::Raw, ImageFormat::Raw, ImageFormat::Qcow2]);
        let modes = ["volatile=on", "volatile=off", "volatile=off,readonly=on"]
            .map(|keys| parse(&format!("path=x,{keys}")).expect(keys).mode);
        assert_eq!(modes, [BlockMode::VolatileWrite, BlockMode::ReadWrite, BlockMode::ReadOnly]);
    }

    #[test]
    fn what_is_no_disk_says_why() {
        for (text, reason) in [
            ("", "path=FILE is missing"),
            ("x.img", "\"x.img\" is no KEY=VALUE"),
            ("id=a", "path=FILE is missing"),
            ("path=", "path=FILE is missing"),
            ("path=a,path=b", "path is there twice"),
            ("path=a,ro=on", "\"ro\" is none of path, id, readonly"),
            ("path=a,readonly=yes", "readonly: \"yes\" is neither on nor off"),
            ("path=a,readonly=on,volatile=on", "volatile: a disk that is readonly has no writes"),
            ("path=a,format=vmdk", "\"vmdk\" is none of raw, qcow2"),
            ("path=a,bps=fast", "bps: a size is a whole number"),
            ("path=a,iops=1k", "iops: \"1k\" is no number that can be"),
            ("path=a,queues=many", "queues: \"many\" is no number that can be"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
