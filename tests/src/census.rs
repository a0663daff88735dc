//! What a process holds, counted in `/proc`: leaks show as counts that do not return to where they were.
//!
//! Limit: a count is a moment's; wait for the expected one (see [`crate::wait`]).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The number of threads of process `pid`.
///
/// # Errors
/// When the process is gone or belongs to another user.
pub fn threads(pid: u32) -> io::Result<usize> {
    entries(pid, "task")
}

/// The number of file descriptors that process `pid` holds.
///
/// # Errors
/// As [`threads`].
pub fn open_files(pid: u32) -> io::Result<usize> {
    entries(pid, "fd")
}

/// Whether process `pid` holds the file of this path open.
///
/// # Errors
/// As [`threads`].
pub fn holds(pid: u32, path: &str) -> io::Result<bool> {
    let mut files = fs::read_dir(file(pid, "fd"))?.filter_map(Result::ok);
    Ok(files.any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == Path::new(path))))
}

/// The number of memfds that process `pid` holds open: files without a name on any disk.
///
/// # Errors
/// As [`threads`].
pub fn memfds(pid: u32) -> io::Result<usize> {
    let files = fs::read_dir(file(pid, "fd"))?.filter_map(Result::ok);
    let memfd = |target: PathBuf| target.to_str().is_some_and(|target| target.starts_with("/memfd:"));
    Ok(files.filter(|entry| fs::read_link(entry.path()).is_ok_and(memfd)).count())
}

/// How often process `pid` has mapped the memfd of this name.
///
/// # Errors
/// As [`threads`].
pub fn mappings(pid: u32, memfd: &str) -> io::Result<usize> {
    let maps = fs::read_to_string(file(pid, "maps"))?;
    Ok(maps.lines().filter(|line| line.contains(&format!("/memfd:{memfd} "))).count())
}

/// The threads of process `pid` by their names, each with the host's CPUs on which it may run, as the kernel writes them: `0-3,6`.
/// One that ends meanwhile is left out; of several with one name there is one.
///
/// # Errors
/// As [`threads`].
pub fn thread_affinities(pid: u32) -> io::Result<BTreeMap<String, String>> {
    let tasks = fs::read_dir(file(pid, "task"))?.filter_map(Result::ok);
    let affinity = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let field = |name| Some(status.lines().find_map(|line| line.strip_prefix(name))?.trim().to_owned());
        Some((field("Name:")?, field("Cpus_allowed_list:")?))
    };
    Ok(tasks.filter_map(affinity).collect())
}

/// The bytes of memory that process `pid` has resident, shared pages included.
///
/// # Errors
/// As [`threads`].
pub fn resident_bytes(pid: u32) -> io::Result<u64> {
    let status = fs::read_to_string(file(pid, "status"))?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    let kib: Option<u64> = kib.and_then(|kib| kib.trim().parse().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| io::Error::other(format!("process {pid} has ended")))
}

/// The bytes of memory of process `pid`, of each page its share (Pss).
///
/// # Errors
/// As [`threads`].
pub fn proportional_bytes(pid: u32) -> io::Result<u64> {
    let rollup = fs::read_to_string(file(pid, "smaps_rollup"))?;
    let kib = rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB"));
    let kib: Option<u64> = kib.and_then(|kib| kib.trim().parse().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| io::Error::other(format!("process {pid} has no memory")))
}

/// Whether process `pid` runs: one that has ended and is only waiting to be reaped does not. Its first thread may end before the
/// others, and the process ends with the last.
pub fn runs(pid: u32) -> bool {
    let threads = || fs::read_dir(file(pid, "task")).map_or(0, Iterator::count);
    stat(pid).is_some_and(|stat| !matches!(stat.state, 'Z' | 'X') || threads() > 1)
}

/// The processes whose parent is `pid`, those that have ended and were not reaped included, in no order.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn children(pid: u32) -> io::Result<Vec<u32>> {
    let everyone = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Ok(everyone.filter(|&other| stat(other).is_some_and(|stat| stat.parent == pid)).collect())
}

/// [`children`], their children and so on.
///
/// # Errors
/// As [`children`].
pub fn descendants(pid: u32) -> io::Result<Vec<u32>> {
    let mut found = children(pid)?;
    let mut next = 0;
    while let Some(&child) = found.get(next) {
        found.extend(children(child)?);
        next += 1;
    }
    Ok(found)
}

/// The name of process `pid` as the kernel keeps it: at most 15 bytes of the program's file name.
///
/// # Errors
/// When the process is gone.
pub fn name(pid: u32) -> io::Result<String> {
    Ok(fs::read_to_string(file(pid, "comm"))?.trim_end().to_owned())
}

/// The command line of process `pid`: the program as it was called and its arguments. Empty once the process has ended.
///
/// # Errors
/// When the process is gone.
pub fn command_line(pid: u32) -> io::Result<Vec<String>> {
    let bytes = fs::read(file(pid, "cmdline"))?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.split_terminator('\0').map(str::to_owned).collect())
}

struct Stat {
    state: char,
    parent: u32,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(file(pid, "stat")).ok()?;
    // The name before these fields may itself hold spaces and parentheses.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some(Stat { state: fields.next()?.chars().next()?, parent: fields.next()?.parse().ok()? })
}

fn entries(pid: u32, folder: &str) -> io::Result<usize> {
    Ok(fs::read_dir(file(pid, folder))?.count())
}

fn file(pid: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{Process, Stdin};
    use crate::wait;
    use std::io::Write;
    use std::process::Command;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(20);

    fn shell(script: &str, stdin: Stdin) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::spawn(command, stdin).unwrap()
    }

    #[test]
    fn threads_and_files_of_a_process_are_counted() {
        let mut process =
            shell("echo ready; read line; exec 7</dev/null; echo open; sleep 1000; true", Stdin::Piped);
        process.stdout().contains("ready", LONG).unwrap();
        assert_eq!(threads(process.pid()).unwrap(), 1);
        let affinities = thread_affinities(process.pid()).unwrap();
        let own = thread_affinities(std::process::id()).unwrap();
        assert_eq!(affinities["sh"], *own.values().next().unwrap(), "a child is where its parent is");
        // It inherits what this process was given open, so only the difference is certain.
        let before = open_files(process.pid()).unwrap();
        process.stdin().unwrap().write_all(b"go on\n").unwrap();
        process.stdout().contains("open", LONG).unwrap();
        assert_eq!(open_files(process.pid()).unwrap(), before + 1);
        assert!(holds(process.pid(), "/dev/null").unwrap() && !holds(process.pid(), "/dev/nul").unwrap());
    }

    #[test]
    fn descendants_are_children_of_children() {
        let process = shell("sh -c 'sleep 1000; true'; true", Stdin::Empty);
        let names = wait::found("a grandchild", LONG, || {
            let names: io::Result<Vec<String>> =
                descendants(process.pid()).unwrap().into_iter().map(name).collect();
            match names {
                Ok(names) if names == ["sh", "sleep"] => Ok(names),
                other => Err(format!("{other:?}")),
            }
        });
        names.unwrap();
        let child = children(process.pid()).unwrap();
        assert_eq!(child.len(), 1);
        assert_eq!(command_line(child[0]).unwrap(), ["sh", "-c", "sleep 1000; true"]);
    }

    #[test]
    fn an_ended_process_does_not_run_though_its_entry_is_there() {
        let process = shell("exit 0", Stdin::Empty);
        process.wait(LONG).unwrap();
        assert!(file(process.pid(), "stat").exists());
        assert!(!runs(process.pid()));
    }
}
