//! What the lab and the guests in it find on their root: busybox, kernel modules, binaries with their libraries.

use std::fs;
use std::path::{Path, PathBuf};

use super::cpio::Archive;
use super::error::LabError;
use super::kernel::{LabKernel, cache_folder};
use super::tool::Tool;
use super::toolset::add_tools;

const BUSYBOX: Tool = Tool {
    program: "busybox",
    package: "busybox-static",
    advice: "install the Debian package busybox-static",
};
const LDD: Tool = Tool { program: "ldd", package: "libc-bin", advice: "a shared library may be missing" };
const STRIP: Tool = Tool { program: "strip", package: "binutils", advice: "the binary may be damaged" };

/// `kvm_amd`: the emulated CPU is AMD's. `tun` and `dummy`: guests' networks.
const LAB_MODULES: [&str; 3] = ["kvm_amd", "tun", "dummy"];
/// Everything that a guest's virtio devices and what is on them need; its init loads those it has a device for.
const GUEST_MODULES: [&str; 9] = [
    "virtio_mmio",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "virtio_mem",
    "ext4",
];

/// What the small devices of a guest's board need. Tests insert them.
const BOARD_MODULES: [&str; 3] = ["button", "evdev", "pvpanic_mmio"];

/// The initramfs of a lab that boots `kernel`: `binaries` are in its `/bin`, the `kernel` and `initramfs` of `guests` in its `/guest`.
pub(super) fn lab(kernel: &LabKernel, guests: &LabKernel, binaries: &[PathBuf]) -> Result<Vec<u8>, LabError> {
    let mut archive = Archive::default();
    // Before busybox, whose `ip` knows less.
    add_tools(&mut archive)?;
    add_busybox(&mut archive)?;
    let mut order = String::new();
    for (name, data) in kernel.modules(&LAB_MODULES)? {
        let path = format!("/lab/modules.d/{name}.ko");
        archive.file(&path, &data);
        order += &format!("{path}\n");
    }
    archive.file("/lab/modules", order.as_bytes());
    archive.program("/init", include_bytes!("init.sh"));
    archive.program("/lab/start", include_bytes!("start.sh"));
    archive.program("/lab/serve", include_bytes!("serve.sh"));
    archive.file("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n");
    archive.file("/etc/group", b"root:x:0:\nnogroup:x:65534:\n");
    for folder in ["/root", "/run", "/tmp", "/var/tmp"] {
        archive.folder(folder);
    }
    for binary in binaries {
        add_binary(&mut archive, binary)?;
    }
    archive.file("/guest/kernel", &read(guests.image())?);
    archive.file("/guest/initramfs", &guest(guests)?);
    Ok(archive.finish())
}

/// The initramfs of a Linux guest in the lab that boots `kernel`.
pub(super) fn guest(kernel: &LabKernel) -> Result<Vec<u8>, LabError> {
    let mut archive = Archive::default();
    add_busybox(&mut archive)?;
    for name in GUEST_MODULES.into_iter().chain(BOARD_MODULES) {
        let mut order = String::new();
        for (module, data) in kernel.modules(&[name])? {
            let path = format!("/modules/{module}.ko");
            archive.file(&path, &data);
            order += &format!("{path}\n");
        }
        archive.file(&format!("/modules/{name}"), order.as_bytes());
    }
    archive.program("/init", include_bytes!("guest-init.sh"));
    for folder in ["/dev", "/proc", "/sys", "/tmp"] {
        archive.folder(folder);
    }
    Ok(archive.finish())
}

/// Busybox with a link for each of its programs. It is linked statically in its package for this purpose, but any will do.
fn add_busybox(archive: &mut Archive) -> Result<(), LabError> {
    let list = BUSYBOX.run(Path::new("/"), &["--list"])?;
    let path = BUSYBOX.find()?;
    archive.program("/bin/busybox", &read(&path)?);
    add_libraries(archive, &path)?;
    let list = String::from_utf8_lossy(&list);
    for name in list.lines().filter(|&name| name != "busybox") {
        archive.link(&format!("/bin/{name}"), "busybox");
    }
    Ok(())
}

fn add_binary(archive: &mut Archive, binary: &Path) -> Result<(), LabError> {
    let name = binary.file_name().unwrap_or_default().to_string_lossy();
    archive.program(&format!("/bin/{name}"), &without_debug_information(binary)?);
    add_libraries(archive, binary)
}

/// Debug information is most of a binary, and every byte is copied twice by an emulated CPU.
fn without_debug_information(binary: &Path) -> Result<Vec<u8>, LabError> {
    let folder = cache_folder()?;
    let stripped =
        tempfile::NamedTempFile::new_in(&folder).map_err(LabError::file("create a file in", &folder))?;
    let (from, to) = (binary.to_string_lossy(), stripped.path().to_string_lossy());
    STRIP.run(Path::new("/"), &["--strip-debug", "-o", &to, &from])?;
    read(stripped.path())
}

/// Adds the shared libraries of `binary` where its loader looks for them.
fn add_libraries(archive: &mut Archive, binary: &Path) -> Result<(), LabError> {
    for library in library_paths(binary, None)? {
        archive.program(&library, &read(Path::new(&library))?);
    }
    Ok(())
}

/// The paths of all shared libraries of `binary`, its loader among them. Those in the folder `first` come before others of their name.
pub(super) fn library_paths(binary: &Path, first: Option<&Path>) -> Result<Vec<String>, LabError> {
    let arguments = [&*binary.to_string_lossy()];
    let environment: Vec<_> = first.map(|folder| ("LD_LIBRARY_PATH", folder)).into_iter().collect();
    let output = LDD.output_with(Path::new("/"), &arguments, &environment)?;
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains("not found") {
        return Err(LDD.failed(&arguments, &output));
    }
    Ok(libraries(&text).map(str::to_owned).collect())
}

/// The paths in the output of ldd: lines `NAME => PATH (ADDRESS)` and `PATH (ADDRESS)`. It has none for a static binary.
fn libraries(ldd: &str) -> impl Iterator<Item = &str> {
    let words = ldd.lines().flat_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    // For a static binary some versions name the binary itself, followed by a colon.
    words.filter(|word| !word.ends_with(':'))
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, LabError> {
    fs::read(path).map_err(LabError::file("read", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let dynamic = "\tlinux-vdso.so.1 (0x00007)\n\tlibc.so.6 => /lib/libc.so.6 (0x00007)\n\t/lib64/ld.so.2 (0x00007)\n";
        assert_eq!(libraries(dynamic).collect::<Vec<_>>(), ["/lib/libc.so.6", "/lib64/ld.so.2"]);
        assert_eq!(libraries("\tstatically linked\n").count(), 0);
    }
}
