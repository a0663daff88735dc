//! Stand-ins for shared libraries that a tool links and no test needs.
//!
//! Debian's fio links the clients of several storage clusters, which link 80 MB more: five seconds of each guest's boot. A
//! stand-in has a library's name and those of its functions that the tool refers to; whoever calls one is told so and ends.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::cpio::Archive;
use super::error::LabError;
use super::initramfs::{library_paths, read};
use super::kernel::cache_folder;
use super::tool::Tool;

/// The libraries stood in for, without `.so` and what follows.
const REPLACED: [&str; 8] =
    ["libgfapi", "libibverbs", "libnbd", "libpmem", "libpmemblk", "librados", "librbd", "librdmacm"];
/// The file that all their names are links to.
const LIBRARY: &str = "liblab-stand-in.so";

const CC: Tool =
    Tool { program: "cc", package: "gcc", advice: "the C compiler may be unfit for this machine" };
const NM: Tool = Tool { program: "nm", package: "binutils", advice: "the binary may be damaged" };

/// The stand-ins of one program, in a folder that its loader may be pointed to.
pub(super) struct StandIns {
    folder: TempDir,
    /// The names that the loader looks for.
    names: Vec<String>,
}

impl StandIns {
    /// Makes those that `program` needs, which may be none.
    pub(super) fn make(program: &Path) -> Result<StandIns, LabError> {
        let cache = cache_folder()?;
        let folder = tempfile::tempdir_in(&cache).map_err(LabError::file("create a folder in", &cache))?;
        let originals: Vec<String> =
            library_paths(program, None)?.into_iter().filter(|path| is_replaced(path)).collect();
        let names = originals.iter().map(|path| file_name(path).to_owned()).collect();
        let stand_ins = StandIns { folder, names };
        if !originals.is_empty() {
            stand_ins.compile(&referred(program, &originals)?)?;
        }
        Ok(stand_ins)
    }

    /// Where they are.
    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Adds them where any loader looks, and returns their paths there.
    pub(super) fn add_to(&self, archive: &mut Archive) -> Result<Vec<String>, LabError> {
        if self.names.is_empty() {
            return Ok(Vec::new());
        }
        let mut paths = vec![format!("/lib/{LIBRARY}")];
        archive.program(&paths[0], &read(&self.path(LIBRARY))?);
        for name in &self.names {
            let path = format!("/lib/{name}");
            archive.link(&path, LIBRARY);
            paths.push(path);
        }
        Ok(paths)
    }

    fn compile(&self, functions: &Functions) -> Result<(), LabError> {
        self.write("stand-in.c", &source(functions))?;
        self.write("versions", &version_script(functions))?;
        let arguments =
            ["-shared", "-fPIC", "-w", "-Wl,--version-script=versions", "-o", LIBRARY, "stand-in.c"];
        CC.run(self.folder(), &arguments)?;
        for name in &self.names {
            let path = self.path(name);
            std::os::unix::fs::symlink(LIBRARY, &path).map_err(LabError::file("create", &path))?;
        }
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> Result<(), LabError> {
        let path = self.path(name);
        fs::write(&path, text).map_err(LabError::file("write to", &path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }
}

/// Names of functions by the version of their library's interface, which is empty where there is none.
type Functions = BTreeMap<String, BTreeSet<String>>;

/// The functions of `libraries` that `program` refers to.
fn referred(program: &Path, libraries: &[String]) -> Result<Functions, LabError> {
    let mut defined = BTreeSet::new();
    for library in libraries {
        let symbols = symbols("--defined-only", library)?;
        defined.extend(symbols.into_values().flatten());
    }
    let mut functions = symbols("--undefined-only", &program.to_string_lossy())?;
    functions.values_mut().for_each(|names| names.retain(|name| defined.contains(name)));
    functions.retain(|_, names| !names.is_empty());
    Ok(functions)
}

fn symbols(which: &str, file: &str) -> Result<Functions, LabError> {
    let output = NM.run(Path::new("/"), &["--dynamic", which, file])?;
    Ok(read_symbols(&String::from_utf8_lossy(&output)))
}

/// Lines of nm end in `NAME`, `NAME@VERSION`, or, for what a library defines by default, `NAME@@VERSION`.
fn read_symbols(nm: &str) -> Functions {
    let mut symbols = Functions::new();
    for word in nm.lines().filter_map(|line| line.split_whitespace().next_back()) {
        let (name, version) = word.split_once('@').unwrap_or((word, ""));
        symbols.entry(version.trim_start_matches('@').to_owned()).or_default().insert(name.to_owned());
    }
    symbols
}

fn source(functions: &Functions) -> String {
    let mut source = "#include <stdio.h>\n#include <stdlib.h>\n\
         static void end(const char *name) { fprintf(stderr, \"%s is not in the lab\\n\", name); abort(); }\n"
        .to_owned();
    for name in functions.values().flatten() {
        let _ = writeln!(source, "void {name}(void) {{ end(\"{name}\"); }}");
    }
    source
}

/// The loader insists on the versions that a program was linked with.
fn version_script(functions: &Functions) -> String {
    let mut script = String::new();
    for (version, names) in functions.iter().filter(|(version, _)| !version.is_empty()) {
        let names: String = names.iter().map(|name| format!(" {name};")).collect();
        let _ = writeln!(script, "{version} {{ global:{names} }};");
    }
    script
}

fn is_replaced(path: &str) -> bool {
    file_name(path).split_once(".so").is_some_and(|(stem, _)| REPLACED.contains(&stem))
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_are_read_with_their_versions() {
        let read = read_symbols("     U a@V_1\n     w b\n0000000000001000 T c@@V_1\n");
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<BTreeSet<_>>();
        assert_eq!(read["V_1"], names(&["a", "c"]));
        assert_eq!(read[""], names(&["b"]));
        assert_eq!(version_script(&read), "V_1 { global: a; c; };\n");
    }

    #[test]
    fn only_whole_names_are_replaced() {
        assert!(is_replaced("/lib/x86_64-linux-gnu/libpmem.so.1"));
        assert!(!is_replaced("/lib/x86_64-linux-gnu/libpmem2.so.1"));
        assert!(!is_replaced("/lib/x86_64-linux-gnu/libc.so.6"));
    }
}
