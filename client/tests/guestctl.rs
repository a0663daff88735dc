//! The command as its users meet it: what it prints, how it ends, what becomes of the terminal.
//!
//! The guest's side is the server of `fake`, on a real socket; nothing here needs a hypervisor.

#[expect(dead_code, reason = "the library's tests look closer at it")]
mod fake;

use fake::{HostServer, Machine};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);

fn guestctl(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_guestctl"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for variable in ["GUESTD_SOCKET", "GUESTD_VMM", "GUESTD_LOG", "GUESTD_HYPERVISOR"] {
        command.env_remove(variable);
    }
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs the command to its end and checks its exit status and that the standard error has this.
fn ends(mut command: Command, status: i32, said: &str) -> Output {
    let output = command.output().expect("started");
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{command:?}: {error}");
    assert!(error.contains(said), "{command:?}: {error:?} lacks {said:?}");
    output
}

/// A service on a socket in a folder of its own, with a kernel for its guests.
struct Service {
    folder: TempDir,
}

impl Service {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("kernel"), "READY\n").expect("written");
        let listener = UnixListener::bind(folder.path().join("socket")).expect("bound");
        std::thread::spawn(|| serve(listener));
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = guestctl(&["--socket"]);
        command.arg(self.path("socket")).args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(&["run", "--kernel"]);
        command.arg(self.path("kernel")).args(arguments);
        command
    }
}

/// The same with no signal ignored, whatever the tests were started with (`nohup` ignores one).
fn with_signals(inner: &Command) -> Command {
    let mut command = Command::new("env");
    command.arg("--default-signal=HUP,INT,TERM").arg(inner.get_program()).args(inner.get_args());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

fn serve(listener: UnixListener) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, async {
        listener.set_nonblocking(true).expect("a socket");
        let listener = tokio::net::UnixListener::from_std(listener).expect("a listener");
        while let Ok((stream, _)) = listener.accept().await {
            HostServer::serve(&Machine::new(), stream.into_std().expect("a socket"));
        }
    });
}

/// A guest that runs.
struct Running {
    child: Child,
    stdout: ChildStdout,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).spawn().expect("started");
        let stdout = child.stdout.take().expect("piped");
        let mut running = Self { child, stdout };
        running.reads("READY\n");
        running
    }

    fn reads(&mut self, expected: &str) {
        let mut bytes = vec![0; expected.len()];
        self.stdout.read_exact(&mut bytes).expect("output");
        assert_eq!(text(&bytes), expected);
    }

    fn types(&mut self, input: &str) {
        let stdin = self.child.stdin.as_mut().expect("piped");
        stdin.write_all(input.as_bytes()).expect("it reads");
    }

    fn signal(&self, signal: Signal) {
        kill(&self.child, signal);
    }

    /// Its exit status, the rest of its output, and its standard error.
    fn ended(mut self) -> (Option<i32>, String, String) {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).expect("output");
        let output = self.child.wait_with_output().expect("waited for");
        (output.status.code(), rest, text(&output.stderr))
    }
}

fn kill(child: &Child, signal: Signal) {
    let pid = i32::try_from(child.id()).expect("a pid");
    kill_process(Pid::from_raw(pid).expect("not 0"), signal).expect("it runs");
}

fn json(error: &str) -> serde_json::Value {
    serde_json::from_str(error.trim_end()).unwrap_or_else(|_| panic!("one JSON object: {error:?}"))
}

#[test]
fn wrong_usage_ends_with_2_and_names_the_value() {
    ends(guestctl(&["run", "--memory", "12Q"]), 2, "unknown unit \"Q\"");
    ends(guestctl(&["run", "--kernel", "/no/such/kernel"]), 2, "--kernel /no/such/kernel: No such file");
    ends(guestctl(&["run", "--kernel", "/"]), 2, "--kernel /: not a regular file");
    ends(guestctl(&["run", "--initrd", "/dev/null"]), 2, "--initrd /dev/null: not a regular file");
    ends(guestctl(&["explode"]), 2, "explode");
    ends(guestctl(&["stop"]), 2, "<ID>");
    ends(guestctl(&["--log", "a=b=c", "ps"]), 2, "--log a=b=c");
}

#[test]
fn a_socket_that_cannot_be_reached_ends_with_3() {
    ends(guestctl(&["--socket", "/no/such/socket", "run"]), 3, "no socket at /no/such/socket");
    let mut by_environment = guestctl(&["run"]);
    by_environment.env("GUESTD_SOCKET", "/no/such/socket");
    ends(by_environment, 3, "no socket at /no/such/socket");
    let folder = tempfile::tempdir().expect("a folder");
    for command in [&["ps"][..], &["info"], &["stop", "web"], &["wait", "web"], &["pause", "web"]] {
        let mut command = guestctl(command);
        command.env("XDG_RUNTIME_DIR", folder.path());
        ends(command, 3, "no guestd runs at ");
    }
}

#[test]
fn a_private_service_without_its_vmm_ends_with_3() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = guestctl(&["--hypervisor", "scripted", "--vmm", "/no/such/vmm", "run"]);
    command.env("XDG_RUNTIME_DIR", folder.path());
    ends(command, 3, "/no/such/vmm");
}

#[test]
fn help_version_and_completions_are_there() {
    let help = text(&ends(guestctl(&["run", "--help"]), 0, "").stdout);
    assert!(help.contains("Examples:") && help.contains("Ctrl-] q"), "{help}");
    let help = text(&ends(guestctl(&["update", "--help"]), 0, "").stdout);
    assert!(["deadline", "on_reset", "log"].iter().all(|node| help.contains(node)), "{help}");
    let help = text(&ends(guestctl(&["debug", "--help"]), 0, "").stdout);
    assert!(help.contains("--gdb <ADDR>") && help.contains("target remote"), "{help}");
    ends(guestctl(&["debug", "web"]), 2, "--gdb <ADDR>");
    let version = text(&ends(guestctl(&["--version"]), 0, "").stdout);
    assert_eq!(version, format!("guestctl {}\n", env!("CARGO_PKG_VERSION")));
    for shell in ["bash", "zsh", "fish"] {
        let script = text(&ends(guestctl(&["completions", shell]), 0, "").stdout);
        for word in ["on-reset", "update"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
}

#[test]
fn piped_input_reaches_the_guest_and_all_output_is_written() {
    let service = Service::start();
    for arguments in [&[][..], &["--proxied"]] {
        let mut running = Running::start(service.run(arguments));
        running.types("hello\n");
        running.reads("hello\n");
        running.types("poweroff\n");
        assert_eq!(running.ended(), (Some(0), "poweroff\n".into(), String::new()), "{arguments:?}");
    }
}

#[test]
fn the_guest_goes_on_after_the_end_of_the_input() {
    let service = Service::start();
    let mut running = Running::start(service.run(&[]));
    running.types("last words\n");
    drop(running.child.stdin.take());
    running.reads("last words\n");
    assert!(running.child.try_wait().expect("asked").is_none(), "it runs on");
    running.signal(Signal::TERM);
    assert_eq!(running.ended().0, Some(143));
}

#[test]
fn json_tells_the_end_in_one_line() {
    let service = Service::start();
    let mut running = Running::start(service.run(&["--json", "--name", "web"]));
    running.types("poweroff");
    let (status, _, error) = running.ended();
    let report = json(&error);
    assert_eq!(status, Some(0));
    assert_eq!((&report["outcome"], &report["id"]), (&"clean".into(), &"web".into()), "{report}");
    let timings = &report["timings_us"];
    for name in ["launch", "create", "first_byte", "total"] {
        assert!(timings[name].is_u64(), "{name} in {report}");
    }
    assert!(timings["total"].as_u64() >= timings["create"].as_u64(), "{report}");
}

#[test]
fn a_failed_guest_ends_with_1_and_its_failure() {
    let service = Service::start();
    let mut running = Running::start(service.run(&[]));
    running.types("crash");
    let (status, output, error) = running.ended();
    assert_eq!((status, &output[..]), (Some(1), "crash"));
    assert_eq!(error, "guestctl: vcpuRuntimeFailure: VP 0: triple fault\n");
    ends(service.run(&["--cpus", "0"]), 1, "guestctl: badConfig: cpus: 0 is not 1 to 254\n");
    ends(service.run(&["--name", "taken"]), 1, "guestctl: badConfig: id: \"taken\" is taken\n");
    let refused = ends(service.run(&["--cpus", "0", "--json"]), 1, "refused");
    assert_eq!(json(&text(&refused.stderr))["code"], "badConfig");
}

impl Service {
    /// Forks of its guest, whose disk is granted.
    fn fork(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(&["fork", "on", "--disk"]);
        command.arg(format!("path={},volatile=on", self.path("kernel").display())).args(arguments);
        command
    }
}

#[test]
fn forks_run_and_end_each_for_itself() {
    let service = Service::start();
    for arguments in [&[][..], &["--proxied"]] {
        let one = ends(service.fork(&[&["--name", "a"], arguments].concat()), 0, "a-1 has ended: clean");
        assert_eq!(text(&one.stdout), "a-1\n");
    }
    // The second crashes, which is told and makes the status.
    let two = ends(service.fork(&["--name=a", "--count=2"]), 1, "a-2 has ended: crashed: vcpuRuntimeFailure");
    let mut ids: Vec<_> = text(&two.stdout).lines().map(str::to_owned).collect();
    ids.sort();
    assert_eq!(ids, ["a-1", "a-2"]);
    let told = text(&ends(service.fork(&["--name=a", "--count=2", "--json"]), 1, "").stdout);
    let of = |id: &str| {
        let events = told.lines().map(json).filter(|event| event["id"] == id);
        events.map(|event| (event["event"].clone(), event["outcome"].clone())).collect::<Vec<_>>()
    };
    for (id, outcome) in [("a-1", "clean"), ("a-2", "crashed")] {
        let expected = [("running".into(), serde_json::Value::Null), ("ended".into(), outcome.into())];
        assert_eq!(of(id), expected, "{told}");
    }
}

#[test]
fn a_signal_ends_all_forks() {
    let service = Service::start();
    let mut child = with_signals(&service.fork(&["--count", "2"])).spawn().expect("started");
    let mut stdout = child.stdout.take().expect("piped");
    let mut bytes = [0; "chosen\n".len() * 2];
    stdout.read_exact(&mut bytes).expect("both run");
    kill(&child, Signal::INT);
    let output = child.wait_with_output().expect("waited for");
    assert_eq!((output.status.code(), text(&bytes)), (Some(130), "chosen\nchosen\n".into()));
    let ended = text(&output.stderr).matches("chosen has ended: forced").count();
    assert_eq!(ended, 2, "{}", text(&output.stderr));
}

#[test]
fn forks_that_cannot_be_say_why() {
    let service = Service::start();
    let no_disk = "guestctl: one has 1 disks (root): it takes as many --disk, in the same order\n";
    ends(service.command(&["fork", "one"]), 2, no_disk);
    ends(
        service.fork(&["--net", "passt=/no/such/socket"]),
        2,
        "one has 0 network devices: it takes as many --net",
    );
    let image = service.path("kernel").display().to_string();
    let written = format!("path={image}");
    let shared = service.command(&["fork", "one", "--count=2", "--name=a", "--disk", &written]);
    ends(shared, 2, &format!("--disk path={image}: 2 guests cannot write one image"));
    let one_socket = service.fork(&["--count=2", "--vsock", "path=a.sock"]);
    ends(one_socket, 2, "guestctl: --vsock: 2 guests cannot have one socket: fork them one by one\n");
    ends(service.fork(&["--vsock", "path=/no/such/a.sock"]), 2, "--vsock path=/no/such/a.sock: No such file");
    let missing = service.command(&["fork", "one", "--disk", "path=/no/such/image"]);
    ends(missing, 2, "--disk path=/no/such/image: No such file");
    ends(service.command(&["fork", "two"]), 1, "guestctl: badConfig: id: there is no guest \"two\"");
    let mut unread = service.fork(&["--name=a"]).spawn().expect("started");
    drop(unread.stdout.take());
    assert_eq!(unread.wait().expect("waited for").code(), Some(141));
}

#[test]
fn signals_stop_the_guest() {
    let service = Service::start();
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let running = Running::start(with_signals(&service.run(&["--json"])));
        running.signal(signal);
        let (ended, _, error) = running.ended();
        assert_eq!(ended, Some(status));
        assert_eq!(json(&error)["outcome"], "forced", "{signal:?}");
    }
}

#[test]
fn a_signal_that_was_ignored_at_the_start_stays_ignored() {
    let service = Service::start();
    let run = service.run(&[]);
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(run.get_program()).args(run.get_args());
    shell.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running::start(shell);
    running.signal(Signal::HUP);
    running.types("still here\n");
    running.reads("still here\n");
    running.types("poweroff\n");
    assert_eq!(running.ended().0, Some(0));
}

#[test]
fn an_output_that_nobody_reads_ends_the_guest_quietly() {
    let service = Service::start();
    let mut running = Running::start(service.run(&[]));
    let Running { stdout, .. } = &mut running;
    let unread = std::mem::replace(stdout, ended_pipe());
    drop(unread);
    running.types("to nobody\n");
    let (status, _, error) = running.ended();
    assert_eq!((status, &error[..]), (Some(141), ""));
}

/// The output of a process that has none.
fn ended_pipe() -> ChildStdout {
    let mut child = Command::new("true").stdout(Stdio::piped()).spawn().expect("started");
    child.wait().expect("waited for");
    child.stdout.take().expect("piped")
}

#[test]
fn update_prints_what_the_node_then_has() {
    let service = Service::start();
    for (value, shown) in [("hi", "HI\n"), ("-1", "-1\n"), ("", "\n")] {
        let output = ends(service.command(&["update", "on", "greeting", value]), 0, "");
        assert_eq!(text(&output.stdout), shown, "{value:?}");
    }
    for (arguments, said) in [
        (["update", "one", "state", "off"], "there is no node \"state\""),
        (["update", "two", "greeting", "hi"], "there is no guest \"two\""),
    ] {
        let output = ends(service.command(&arguments), 1, said);
        assert!(output.stdout.is_empty());
    }
    ends(service.command(&["update", "one", "greeting"]), 2, "<VALUE>");
}

#[test]
fn dump_writes_a_file_once_it_is_whole() {
    let service = Service::start();
    let path = service.path("core");
    let name = path.to_str().expect("text");
    std::fs::write(&path, "a former one").expect("written");
    ends(service.command(&["dump", "one", name]), 0, "");
    let core = std::fs::read(&path).expect("there");
    assert_eq!(core.len() as u64, fake::CORE_BYTES);
    assert!((0..).zip(&core).all(|(offset, byte)| *byte == fake::core_byte(offset)));
    let blocks = std::fs::metadata(&path).expect("there").blocks();
    assert!(blocks * 512 < 1 << 20, "{blocks} blocks: zeros are holes");

    ends(service.command(&["dump", "two", name]), 1, "there is no guest \"two\"");
    assert_eq!(std::fs::read(&path).expect("there"), core, "a dump that fails replaces nothing");
    let nowhere = service.path("nowhere/core");
    ends(service.command(&["dump", "one", nowhere.to_str().expect("text")]), 1, "nowhere/core: No such file");
    let left: Vec<_> = std::fs::read_dir(service.folder.path()).expect("there").flatten().collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn nmi_says_why_it_is_refused() {
    let service = Service::start();
    ends(service.command(&["nmi", "one"]), 1, "the guest does not run");
}

#[test]
fn ps_lists_guests() {
    let service = Service::start();
    let table = text(&ends(service.command(&["ps"]), 0, "").stdout);
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows, [["ID", "PHASE", "VPS", "PID", "UPTIME"], ["one", "empty", "2", "4711", "-"]]);
    let list = json(&text(&ends(service.command(&["ps", "--json"]), 0, "").stdout));
    assert_eq!(list[0]["pid"], 4711);
}

/// A terminal, with the command in its foreground.
struct Terminal {
    master: File,
    slave: File,
    child: Child,
    seen: String,
}

impl Terminal {
    fn start(run: &Command) -> Self {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
        grantpt(&master).expect("granted");
        unlockpt(&master).expect("unlocked");
        let name = ptsname(&master, Vec::new()).expect("its name").into_string().expect("ASCII");
        let slave = OpenOptions::new().read(true).write(true).open(name).expect("opened");
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(run.get_program()).args(run.get_args());
        let end = || Stdio::from(slave.try_clone().expect("duplicated"));
        let child = command.stdin(end()).stdout(end()).stderr(Stdio::piped()).spawn().expect("setsid runs");
        let mut terminal = Self { master: master.into(), slave, child, seen: String::new() };
        terminal.shows("READY");
        terminal.waits_for("raw mode", |terminal| terminal.is_raw());
        terminal
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.slave).expect("a terminal").local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    fn waits_for(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !condition(self) {
            assert!(started.elapsed() < PATIENCE, "{what} did not come");
            std::thread::yield_now();
        }
    }

    fn shows(&mut self, expected: &str) {
        let mut buffer = [0; 256];
        while !self.seen.contains(expected) {
            let count = self.master.read(&mut buffer).expect("output");
            self.seen.push_str(&text(&buffer[..count]));
        }
    }

    fn types(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).expect("typed");
    }

    /// Its exit status, once it has ended and given the terminal back.
    fn ended(mut self) -> Option<i32> {
        let status = self.child.wait().expect("waited for");
        assert!(!self.is_raw(), "the terminal was given back");
        status.code()
    }
}

#[test]
fn a_terminal_is_raw_for_the_guest_and_given_back() {
    let service = Service::start();
    let mut terminal = Terminal::start(&service.run(&[]));
    // Ctrl-C and a lone escape are the guest's.
    terminal.types("ab\x03\x1dx");
    terminal.shows("ab\x03\x1dx");
    terminal.types("\x1dq");
    assert_eq!(terminal.ended(), Some(130));

    let mut terminal = Terminal::start(&service.run(&[]));
    terminal.types("poweroff");
    assert_eq!(terminal.ended(), Some(0));

    for (signal, status) in [(Signal::TERM, 143), (Signal::HUP, 129), (Signal::INT, 130)] {
        let terminal = Terminal::start(&with_signals(&service.run(&[])));
        kill(&terminal.child, signal);
        assert_eq!(terminal.ended(), Some(status));
    }
}

#[test]
fn a_console_has_the_size_of_the_terminal() {
    let service = Service::start();
    let mut terminal = Terminal::start(&service.run(&["--console", "--attach", "console"]));
    terminal.shows("0x0");
    for (columns, rows) in [(132, 43), (80, 25)] {
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&terminal.master, size).expect("resized");
        terminal.shows(&format!("{columns}x{rows}"));
    }
    terminal.types("poweroff");
    assert_eq!(terminal.ended(), Some(0));
}
