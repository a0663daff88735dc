//! The kernels and modules of the lab and of guests in it: Debian's own, each downloaded once, when it is first needed, and kept.
//!
//! They are kept in `GUESTD_LAB_DIR`, or else in the folder `lab` of cargo's target folder, as long as that folder is there:
//! newer kernels come after its removal.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::error::LabError;
use super::tool::Tool;

const APT: &str = "run `apt-get update` as root; the lab's kernels come from Debian's archive";

const APT_CACHE: Tool = Tool { program: "apt-cache", package: "apt", advice: APT };
const APT_GET: Tool = Tool { program: "apt-get", package: "apt", advice: APT };
const DPKG_DEB: Tool = Tool { program: "dpkg-deb", package: "dpkg", advice: "the download may be damaged" };
const XZ: Tool = Tool { program: "xz", package: "xz-utils", advice: "the module may be damaged" };

/// One of Debian's kernels for this architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum DebianKernel {
    /// The one for virtual machines: it has few drivers and is up soonest. The lab itself boots it.
    #[default]
    Cloud,
    /// The one for any machine. It has a driver for the VM generation ID, which the other is built without.
    Generic,
}

impl DebianKernel {
    /// All there are.
    pub const ALL: [DebianKernel; 2] = [DebianKernel::Cloud, DebianKernel::Generic];

    /// The package that depends on the newest one.
    fn meta_package(self) -> &'static str {
        match self {
            DebianKernel::Cloud => "linux-image-cloud-amd64",
            DebianKernel::Generic => "linux-image-amd64",
        }
    }

    /// The folder that it is kept in, beside the other.
    fn folder(self) -> &'static str {
        match self {
            DebianKernel::Cloud => "kernel",
            DebianKernel::Generic => "kernel-generic",
        }
    }
}

/// A kernel and its modules on this machine's disk.
#[derive(Debug, Clone)]
pub struct LabKernel {
    folder: PathBuf,
    image: PathBuf,
    modules: BTreeMap<String, PathBuf>,
    /// Names of what would be modules and is part of the image.
    built_in: BTreeSet<String>,
}

impl LabKernel {
    /// Finds a kernel, or downloads it first.
    pub(super) fn obtain(which: DebianKernel) -> Result<LabKernel, LabError> {
        let cache = cache_folder()?;
        fs::create_dir_all(&cache).map_err(LabError::file("create", &cache))?;
        let kernel = cache.join(which.folder());
        let _lock = lock(&cache.join("lock"))?;
        if !kernel.exists() {
            download(which, &cache, &kernel)?;
        }
        LabKernel::open(&kernel)
    }

    fn open(folder: &Path) -> Result<LabKernel, LabError> {
        let missing = |what: &str| LabError::Kernel { what: what.to_owned(), folder: folder.to_owned() };
        let files = files_below(folder)?;
        let image = files.iter().find(|file| file_name(file).starts_with("vmlinuz-"));
        let modules = files.iter().filter_map(|file| Some((module_name(file)?, file.clone())));
        Ok(LabKernel {
            folder: folder.to_owned(),
            image: image.ok_or_else(|| missing("vmlinuz-*"))?.clone(),
            modules: modules.collect(),
            built_in: built_in(&files)?,
        })
    }

    /// The compressed kernel (bzImage).
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// The modules `names` and all they depend on, in the order in which they are to be inserted: name and contents. What is
    /// built in is left out.
    pub(super) fn modules(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>, LabError> {
        let mut ordered = Vec::new();
        for name in names {
            self.add_module(name, &mut ordered)?;
        }
        Ok(ordered)
    }

    fn add_module(&self, name: &str, ordered: &mut Vec<(String, Vec<u8>)>) -> Result<(), LabError> {
        if self.built_in.contains(name) || ordered.iter().any(|(added, _)| added == name) {
            return Ok(());
        }
        let data = self.read_module(name)?;
        for dependency in dependencies(&data) {
            self.add_module(&dependency, ordered)?;
        }
        ordered.push((name.to_owned(), data));
        Ok(())
    }

    fn read_module(&self, name: &str) -> Result<Vec<u8>, LabError> {
        let path = self.modules.get(name).ok_or_else(|| LabError::Kernel {
            what: format!("kernel module {name}"),
            folder: self.folder.clone(),
        })?;
        match path.extension().is_some_and(|extension| extension == "xz") {
            true => XZ.run(&self.folder, &["-dc", &path.to_string_lossy()]),
            false => fs::read(path).map_err(LabError::file("read", path)),
        }
    }
}

/// Where the lab keeps what it downloads.
pub(super) fn cache_folder() -> Result<PathBuf, LabError> {
    if let Some(folder) = std::env::var_os("GUESTD_LAB_DIR") {
        return Ok(folder.into());
    }
    let exe = std::env::current_exe().map_err(LabError::file("find", Path::new("the running executable")))?;
    // Cargo marks its target folder with this file.
    match exe.ancestors().find(|folder| folder.join("CACHEDIR.TAG").exists()) {
        Some(target) => Ok(target.join("lab")),
        None => Err(LabError::NoFolder { exe }),
    }
}

/// Several test binaries may prepare at once: the first one downloads, the others wait.
fn lock(path: &Path) -> Result<File, LabError> {
    let file = File::create(path).map_err(LabError::file("create", path))?;
    file.lock().map_err(LabError::file("lock", path))?;
    Ok(file)
}

/// Unpacks beside the final place and renames, so that an interrupted download leaves nothing that looks whole.
fn download(which: DebianKernel, cache: &Path, kernel: &Path) -> Result<(), LabError> {
    let work = tempfile::tempdir_in(cache).map_err(LabError::file("create a folder in", cache))?;
    let package = newest_package(which, work.path())?;
    APT_GET.run(work.path(), &["download", &package])?;
    let archive = files_below(work.path())?.into_iter().find(|file| file_name(file).ends_with(".deb"));
    let archive =
        archive.ok_or_else(|| LabError::Kernel { what: package, folder: work.path().to_owned() })?;
    let unpacked = work.path().join("unpacked");
    DPKG_DEB.run(work.path(), &["-x", &archive.to_string_lossy(), &unpacked.to_string_lossy()])?;
    fs::rename(&unpacked, kernel).map_err(LabError::file("rename", &unpacked))
}

fn newest_package(which: DebianKernel, folder: &Path) -> Result<String, LabError> {
    let arguments = ["depends", which.meta_package()];
    let output = APT_CACHE.output(folder, &arguments)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let package = text.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    match package {
        Some(rest) => Ok(format!("linux-image-{rest}")),
        None => Err(APT_CACHE.failed(&arguments, &output)),
    }
}

fn files_below(folder: &Path) -> Result<Vec<PathBuf>, LabError> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(LabError::file("read", &folder))? {
            let entry = entry.map_err(LabError::file("read", &folder))?;
            let kind = entry.file_type().map_err(LabError::file("read", &folder))?;
            if kind.is_dir() { folders.push(entry.path()) } else { files.push(entry.path()) }
        }
    }
    Ok(files)
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// `kvm-amd.ko.xz` holds the module that the kernel and other modules call `kvm_amd`.
fn module_name(path: &Path) -> Option<String> {
    let name = file_name(path).trim_end_matches(".xz").strip_suffix(".ko")?;
    Some(name.replace('-', "_"))
}

/// The kernel's package lists what is built in by the paths that the modules would have.
fn built_in(files: &[PathBuf]) -> Result<BTreeSet<String>, LabError> {
    let Some(list) = files.iter().find(|file| file_name(file) == "modules.builtin") else {
        return Ok(BTreeSet::new());
    };
    let text = fs::read_to_string(list).map_err(LabError::file("read", list))?;
    Ok(text.lines().filter_map(|line| module_name(Path::new(line))).collect())
}

/// The names in a module's `depends=` record: a string of its section `.modinfo`, comma separated, ended by a zero.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let list = module[start + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    let names = list.split(|&byte| byte == b',').filter(|name| !name.is_empty());
    names.map(|name| String::from_utf8_lossy(name).replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_the_module() {
        assert_eq!(dependencies(b"x\0depends=virtio-ring,virtio\0name=y\0"), ["virtio_ring", "virtio"]);
        assert!(dependencies(b"x\0depends=\0name=y\0").is_empty());
        assert!(dependencies(b"no record").is_empty());
    }

    #[test]
    fn modules_are_named_as_the_kernel_names_them() {
        assert_eq!(module_name(Path::new("/x/kvm-amd.ko")).as_deref(), Some("kvm_amd"));
        assert_eq!(module_name(Path::new("/x/virtio_net.ko.xz")).as_deref(), Some("virtio_net"));
        assert_eq!(module_name(Path::new("/x/modules.builtin")), None);
    }

    #[test]
    fn modules_come_after_what_they_depend_on() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, data: &[u8]| fs::write(folder.path().join(name), data).unwrap();
        write("vmlinuz-6", b"");
        write("a.ko", b"\0depends=b,c\0");
        write("b.ko", b"\0depends=c\0");
        write("c.ko", b"\0depends=\0");
        write("modules.builtin", b"kernel/fs/built-in.ko\n");
        let kernel = LabKernel::open(folder.path()).unwrap();
        let names: Vec<String> =
            kernel.modules(&["c", "built_in", "a"]).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["c", "b", "a"]);
        let error = kernel.modules(&["d"]).unwrap_err().to_string();
        assert!(error.starts_with("no kernel module d in "), "{error}");
    }
}
