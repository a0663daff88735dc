//! The tools that tests of devices need: Debian's programs, in the lab's `/bin`, and in a guest's on request.
//!
//! They are not in every guest's initramfs, for each byte there is copied and unpacked by an emulated CPU. The lab's program
//! `guest-initramfs` makes the one with the tools asked for, out of the lab's own files. Part: fio's stand-ins.

use std::collections::BTreeSet;
use std::path::Path;

use super::cpio::Archive;
use super::error::LabError;
use super::initramfs::{library_paths, read};
use super::stand_in::StandIns;
use super::tool::Tool;

/// What a guest has beside busybox and its drivers, by the kind of device that it serves to test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Toolset {
    /// `fio`, `mkfs.ext4`, `e2fsck`.
    Block,
    /// `iperf3`, `ethtool`.
    Net,
    /// `socat`.
    Vsock,
}

const FIO: Tool = debian("fio", "fio");
/// Needed by the lab's own host, beside those of all toolsets.
const HOST: [Tool; 2] = [debian("ip", "iproute2"), debian("passt", "passt")];

impl Toolset {
    /// All there are.
    pub const ALL: [Toolset; 3] = [Toolset::Block, Toolset::Net, Toolset::Vsock];

    /// The name that the lab's `guest-initramfs` knows it by.
    pub fn name(self) -> &'static str {
        match self {
            Toolset::Block => "block",
            Toolset::Net => "net",
            Toolset::Vsock => "vsock",
        }
    }

    fn tools(self) -> &'static [Tool] {
        const BLOCK: [Tool; 3] = [FIO, debian("mkfs.ext4", "e2fsprogs"), debian("e2fsck", "e2fsprogs")];
        const NET: [Tool; 2] = [debian("iperf3", "iperf3"), debian("ethtool", "ethtool")];
        const VSOCK: [Tool; 1] = [debian("socat", "socat")];
        match self {
            Toolset::Block => &BLOCK,
            Toolset::Net => &NET,
            Toolset::Vsock => &VSOCK,
        }
    }
}

const fn debian(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package, advice: "a shared library may be missing" }
}

/// Fails when a tool is not installed.
pub(super) fn find_tools() -> Result<(), LabError> {
    let of_sets = Toolset::ALL.iter().flat_map(|set| set.tools());
    HOST.iter().chain(of_sets).try_for_each(|tool| tool.find().map(drop))
}

/// Adds all tools with their libraries, and for each toolset the list of what belongs to it. What stands in `archive`
/// already is not replaced.
pub(super) fn add_tools(archive: &mut Archive) -> Result<(), LabError> {
    archive.program("/bin/guest-initramfs", include_bytes!("guest-initramfs.sh"));
    for tool in HOST {
        add_tool(archive, tool)?;
    }
    for set in Toolset::ALL {
        let mut paths = BTreeSet::new();
        for &tool in set.tools() {
            paths.extend(add_tool(archive, tool)?);
        }
        archive.file(&format!("/lab/toolsets/{}", set.name()), cpio_list(&paths).as_bytes());
    }
    Ok(())
}

/// Adds one tool, and returns the paths of all that it consists of.
fn add_tool(archive: &mut Archive, tool: Tool) -> Result<Vec<String>, LabError> {
    let program = tool.find()?;
    let stand_ins = StandIns::make(&program)?;
    let inside = format!("/bin/{}", tool.program);
    archive.program(&inside, &read(&program)?);
    let mut paths = vec![inside];
    paths.extend(stand_ins.add_to(archive)?);
    let libraries = library_paths(&program, Some(stand_ins.folder()))?;
    for library in libraries.into_iter().filter(|library| !Path::new(library).starts_with(stand_ins.folder()))
    {
        archive.program(&library, &read(Path::new(&library))?);
        paths.push(library);
    }
    Ok(paths)
}

/// What `cpio -o` reads in `/`: the paths and the folders above them, which come first.
fn cpio_list(paths: &BTreeSet<String>) -> String {
    let with_folders = paths.iter().flat_map(|path| Path::new(path.trim_start_matches('/')).ancestors());
    let names: BTreeSet<String> = with_folders.map(|path| path.to_string_lossy().into_owned()).collect();
    names.into_iter().filter(|name| !name.is_empty()).map(|name| name + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_before_what_they_hold() {
        let paths = ["/lib/deep/b.so", "/bin/a"].map(str::to_owned);
        assert_eq!(cpio_list(&BTreeSet::from(paths)), "bin\nbin/a\nlib\nlib/deep\nlib/deep/b.so\n");
    }
}
