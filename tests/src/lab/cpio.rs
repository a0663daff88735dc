//! Writes cpio archives of the "newc" format, which the kernel unpacks as an initramfs.
//!
//! Format: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`. A header is the magic `070701` and 13
//! numbers of 8 hexadecimal digits; header with name, and data, are each padded to 4 bytes. Limit: files below 4 GiB.

use std::collections::BTreeSet;

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;

/// An archive in memory. Paths may begin with `/`; folders above a path are made as needed; of two entries with one path
/// the first counts.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    paths: BTreeSet<String>,
}

impl Archive {
    /// Adds a folder.
    pub(super) fn folder(&mut self, path: &str) {
        self.add(path, FOLDER, &[]);
    }

    /// Adds a regular file that everyone may read and execute.
    pub(super) fn program(&mut self, path: &str, data: &[u8]) {
        self.add(path, FILE | 0o755, data);
    }

    /// Adds a regular file that everyone may read.
    pub(super) fn file(&mut self, path: &str, data: &[u8]) {
        self.add(path, FILE | 0o644, data);
    }

    /// Adds a symbolic link to `target`.
    pub(super) fn link(&mut self, path: &str, target: &str) {
        self.add(path, LINK, target.as_bytes());
    }

    /// Ends the archive and returns it.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn add(&mut self, path: &str, mode: u32, data: &[u8]) {
        let path = path.trim_matches('/');
        if path.is_empty() || !self.paths.insert(path.to_owned()) {
            return;
        }
        if let Some((above, _)) = path.rsplit_once('/') {
            self.folder(above);
        }
        self.entry(path, mode, data);
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        let name_size = size(path.len() + 1);
        // Inode, mode, uid, gid, links, mtime, size, device (2), special device (2), length of the name, checksum.
        let header = [self.entries, mode, 0, 0, 1, 0, size(data.len()), 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for number in header {
            self.bytes.extend_from_slice(format!("{number:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn size(length: usize) -> u32 {
    u32::try_from(length).expect("files in the lab are below 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{Process, Stdin};
    use std::process::Command;
    use std::time::Duration;

    #[test]
    fn another_implementation_reads_it() {
        let mut archive = Archive::default();
        archive.program("/bin/tool", b"odd");
        archive.link("/bin/alias", "tool");
        archive.file("etc/deep/file", b"text\n");
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("archive"), archive.finish()).unwrap();
        let script = "busybox cpio -idm <archive && cat bin/alias etc/deep/file && test -x bin/tool && test ! -x etc/deep/file";
        let mut command = Command::new("sh");
        command.args(["-c", script]).current_dir(folder.path());
        let process = Process::spawn(command, Stdin::Empty).unwrap();
        let limit = Duration::from_secs(20);
        assert!(process.wait(limit).unwrap().success(), "{}", process.last_words());
        assert_eq!(process.stdout().to_end(limit).unwrap(), b"oddtext\n");
    }

    #[test]
    fn a_path_is_entered_once() {
        let mut archive = Archive::default();
        archive.folder("/a/b");
        archive.file("/a/b/c", b"");
        archive.file("/a/d", b"");
        archive.file("a/d", b"other");
        assert_eq!(archive.entries, 4);
    }
}
