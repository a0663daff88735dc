//! Disks as the command line takes them: `path=FILE[,KEY=VALUE]…`.

use crate::ending::{Outcome, Trouble};
use crate::size;
use guest_client::{BlockConfig, BlockMode, Lifecycle, RateLimits};
use std::fs::{File, OpenOptions};
use std::path::PathBuf;

const KEYS: &str = "path, id, readonly, volatile, format, bps, bps-burst, iops, iops-burst, queues";

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The image.
    path: PathBuf,
    id: String,
    mode: BlockMode,
    limits: RateLimits,
    queues: u16,
}

/// Reads a disk. A comma ends a value, also in a path.
pub fn parse(text: &str) -> Result<Disk, String> {
    let (mut path, mut read_only, mut volatile) = (None, false, false);
    let mut disk = Disk {
        path: PathBuf::new(),
        id: String::new(),
        mode: BlockMode::ReadWrite,
        limits: RateLimits::default(),
        queues: 1,
    };
    let mut seen = Vec::new();
    for item in text.split(',') {
        let (key, value) = item
            .split_once('=')
            .ok_or_else(|| format!("{item:?} is no KEY=VALUE: a disk is path=FILE and then any of {KEYS}"))?;
        if seen.contains(&key) {
            return Err(format!("{key} is there twice"));
        }
        seen.push(key);
        let amount = || size::parse(value).map_err(|problem| format!("{key}: {problem}"));
        match key {
            "path" => path = Some(PathBuf::from(value)),
            "id" => disk.id = value.to_owned(),
            "readonly" => read_only = switch(key, value)?,
            "volatile" => volatile = switch(key, value)?,
            "format" => format(value)?,
            "bps" => disk.limits.bytes_per_second = amount()?,
            "bps-burst" => disk.limits.bytes_burst = amount()?,
            "iops" => disk.limits.operations_per_second = number(key, value)?,
            "iops-burst" => disk.limits.operations_burst = number(key, value)?,
            "queues" => {
                disk.queues = value.parse().map_err(|_| format!("queues: {value:?} is not from 1 to 16"))?;
            }
            _ => return Err(format!("{key:?} is none of {KEYS}")),
        }
    }
    disk.path = path.filter(|path| !path.as_os_str().is_empty()).ok_or("path=FILE is missing")?;
    disk.mode = match (read_only, volatile) {
        (true, true) => return Err("readonly and volatile are one too many: nothing is written".into()),
        (true, false) => BlockMode::ReadOnly,
        (false, true) => BlockMode::VolatileWrite,
        (false, false) => BlockMode::ReadWrite,
    };
    Ok(disk)
}

fn number(key: &str, value: &str) -> Result<u64, String> {
    value.parse().map_err(|_| format!("{key}: {value:?} is no whole number"))
}

fn switch(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{key}: {value:?} is neither on nor off")),
    }
}

fn format(value: &str) -> Result<(), String> {
    match value {
        "raw" => Ok(()),
        "qcow2" => {
            Err("format: qcow2 is not supported yet; `qemu-img convert -O raw` makes a raw image".into())
        }
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
    /// Opens the image with the user's own rights: for writing only if the guest may.
    pub fn open(&self) -> Outcome<OpenDisk> {
        let mut options = OpenOptions::new();
        options.read(true).write(self.mode == BlockMode::ReadWrite);
        let image = options
            .open(&self.path)
            .map_err(|error| Trouble::Usage(format!("--disk path={}: {error}", self.path.display())))?;
        Ok(OpenDisk { disk: self.clone(), image })
    }
}

impl OpenDisk {
    /// The disk as part of a config.
    pub fn config(self, lifecycle: &Lifecycle) -> BlockConfig {
        let Disk { path: _, id, mode, limits, queues } = self.disk;
        BlockConfig { id, limits, queues, ..BlockConfig::raw(lifecycle.file(self.image), mode) }
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
        let expected =
            Disk { path: "x".into(), id: "root".into(), mode: BlockMode::ReadOnly, limits, queues: 2 };
        assert_eq!(disk, Ok(expected));
        let mode = |text: &str| parse(text).expect("valid").mode;
        assert_eq!(mode("path=x,volatile=on,readonly=off"), BlockMode::VolatileWrite);
    }

    #[test]
    fn what_is_no_disk_says_why() {
        for (text, reason) in [
            ("", "\"\" is no KEY=VALUE: a disk is path=FILE"),
            ("x.img", "\"x.img\" is no KEY=VALUE"),
            ("id=a", "path=FILE is missing"),
            ("path=", "path=FILE is missing"),
            ("path=a,path=b", "path is there twice"),
            ("path=a,ro=on", "\"ro\" is none of path, id, readonly"),
            ("path=a,readonly=yes", "readonly: \"yes\" is neither on nor off"),
            ("path=a,readonly=on,volatile=on", "one too many"),
            ("path=a,format=vmdk", "\"vmdk\" is none of raw, qcow2"),
            ("path=a,format=qcow2", "qcow2 is not supported yet"),
            ("path=a,bps=fast", "bps: a size is a whole number"),
            ("path=a,iops=1k", "iops: \"1k\" is no whole number"),
            ("path=a,queues=many", "queues: \"many\" is not"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
