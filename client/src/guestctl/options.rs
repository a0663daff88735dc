//! The command line.

use crate::debug::Gdb;
use crate::devices::{DeviceOptions, NET};
use crate::fork::Fork;
use crate::snapshot::Snapshot;
use crate::{cpus, duration, size};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use guest_client::{CpuidMask, OnReset, VpAffinity};
use std::path::PathBuf;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  guestctl demo                      see what a guest's life is, in a few seconds
  guestctl run                       boot the built-in guest; type `help`, leave with Ctrl-] q
  echo poweroff | guestctl run       the same without a terminal
  guestctl run --kernel vmlinuz --initrd initrd --cmdline console=ttyS0 --cpus 2 --memory 1G
  guestctl ps                        the guests of a running guestd
  guestctl fork web --count 3        three more that go on from where `web` is
  guestctl snapshot save web .       keep `web` as it is now in a file, web.snapshot
  guestctl stop web                  stop the guest whose id begins with `web`

Exit status: 0 success; 1 the guest failed, its kernel panicked, or the request was refused; 2 wrong usage; 3 no KVM or no service; 128 + N after \
signal N (130 after Ctrl-C or Ctrl-] q); 141 when nobody reads the output any more.";

/// Runs virtual machine guests, alone or through guestd.
#[derive(Debug, Parser)]
#[command(name = "guestctl", version, after_help = EXAMPLES)]
pub struct Options {
    /// guestd's socket [default: guestd.sock in $XDG_RUNTIME_DIR, else /run/guestd/guestd.sock for root and
    /// /run/user/UID/guestd.sock for others; without a guestd there, run and demo use a private one for as long as they last]
    #[arg(
        long,
        global = true,
        env = "GUESTD_SOCKET",
        help_heading = "Service",
        value_name = "PATH",
        hide_env_values = true
    )]
    pub socket: Option<PathBuf>,
    /// The guest-vmm of a private service [default: beside guestctl, then in PATH]
    #[arg(
        long,
        global = true,
        env = "GUESTD_VMM",
        help_heading = "Service",
        value_name = "FILE",
        hide_env_values = true
    )]
    pub vmm: Option<PathBuf>,
    /// The hypervisor of a private service: kvm, or scripted for tests
    #[arg(
        long,
        global = true,
        env = "GUESTD_HYPERVISOR",
        value_name = "NAME",
        default_value = "kvm",
        hide = true
    )]
    pub hypervisor: String,
    /// Logs of this process and its private service to the standard error, for instance info or guest_service=debug
    #[arg(
        long,
        global = true,
        env = "GUESTD_LOG",
        help_heading = "Service",
        value_name = "FILTER",
        hide_env_values = true
    )]
    pub log: Option<String>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a guest, with its serial line here, until it ends
    Run(Box<Run>),
    /// Launch guests that go on from where another one is, and stay until they have ended
    Fork(Box<Fork>),
    /// A tour of a guest's life with the built-in guest
    Demo,
    /// List the guests of the running guestd
    Ps {
        /// One JSON array instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Stop a guest: by force, or by its power button
    Stop(Stop),
    /// Wait for the end of a guest: exit status as that of `run`
    Wait {
        /// Its id, or a unique beginning of it
        id: String,
    },
    /// Hold a running guest
    Pause {
        /// Its id, or a unique beginning of it
        id: String,
    },
    /// Let a paused guest go on
    Resume {
        /// Its id, or a unique beginning of it
        id: String,
    },
    /// Start a guest anew
    Reset {
        /// Its id, or a unique beginning of it
        id: String,
    },
    /// Send a guest's processors a non-maskable interrupt, as a front panel's button does
    Nmi {
        /// Its id, or a unique beginning of it
        id: String,
    },
    /// Write a guest's registers and memory to an ELF core file, for gdb, crash or drgn
    Dump(Dump),
    /// Keep guests as they are on disk
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Show what a guest and its machine are made of, and how they are
    Inspect(Look),
    /// Change a value that `inspect` shows, where that is possible, and print it
    Update(Change),
    /// Show what becomes of a guest, from its beginning to its end
    Events {
        /// Its id, or a unique beginning of it
        id: String,
        /// Begin with the event of this number, 0 being the first
        #[arg(long, value_name = "N", default_value_t = 0)]
        from: u64,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Show a guest's state units, and which depend on which
    Graph {
        /// Its id, or a unique beginning of it
        id: String,
        /// As what
        #[arg(long, value_name = "FORMAT", value_enum, default_value_t = GraphFormat::Tree)]
        format: GraphFormat,
    },
    /// Show a guest's latest transitions, unit by unit, times in µs
    Timeline {
        /// Its id, or a unique beginning of it
        id: String,
        /// Write them to this file instead, as JSON for a viewer of Chrome traces
        #[arg(long, value_name = "FILE")]
        trace: Option<PathBuf>,
    },
    /// Let gdb debug a guest, one gdb after the other, until Ctrl-C or the guest's end
    #[command(after_help = DEBUG)]
    Debug {
        /// Its id, or a unique beginning of it
        id: String,
        /// Where to wait for gdb: HOST:PORT (port 0: any that is free) or the PATH of a Unix socket. Whoever can connect there rules
        /// the guest
        #[arg(long, value_name = "ADDR")]
        gdb: Gdb,
    },
    /// What the running guestd says of itself
    Info {
        /// One JSON object instead of lines
        #[arg(long)]
        json: bool,
    },
    /// Print a completion script; for bash, put it into ~/.local/share/bash-completion/completions
    Completions {
        /// The shell
        shell: Shell,
    },
}

const STOP: &str = "\
Without --graceful the guest is halted at once, as if its plug was pulled. With it, the guest is asked to shut down, and told so by \
an ACPI power button; an operating system that listens to it ends by itself, which counts as a clean end. One that does not, or that \
is paused, is stopped by force after the timeout. What happened is printed.

Examples:
  guestctl stop web
  guestctl stop web --graceful
  guestctl stop web --graceful --timeout 5min";

/// `guestctl stop`.
#[derive(Debug, Args)]
#[command(after_help = STOP)]
pub struct Stop {
    /// The guest's id, or a unique beginning of it
    pub id: String,
    /// Press its power button, and wait until it has shut down
    #[arg(long)]
    pub graceful: bool,
    /// How long to wait before it is stopped by force: 500ms, 30s, 2min
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration::parse, requires = "graceful")]
    pub timeout: Duration,
}

const DUMP: &str = "\
A guest that runs is held until the file is written, so that it is of one moment, and goes on afterwards. Memory is at its guest \
physical addresses; pages of zeros are holes in the file. Processor N is thread N + 1.

Examples:
  guestctl dump web web.core && gdb -ex 'info threads' kernel web.core
  guestctl dump --live web web.core";

/// `guestctl dump`.
#[derive(Debug, Args)]
#[command(after_help = DUMP)]
pub struct Dump {
    /// The guest's id, or a unique beginning of it
    pub id: String,
    /// The file; one that is there is replaced once the dump is whole
    pub file: PathBuf,
    /// Let the guest run meanwhile: its memory is then not of one moment
    #[arg(long)]
    pub live: bool,
}

/// `guestctl inspect`.
#[derive(Debug, Args)]
pub struct Look {
    /// The guest's id, or a unique beginning of it
    pub id: String,
    /// A node of the tree, its names joined by `/` [default: the root]
    #[arg(default_value = "", hide_default_value = true)]
    pub path: String,
    /// How many levels below that node, 32 at most
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub depth: u32,
    /// JSON instead of lines
    #[arg(long)]
    pub json: bool,
}

const UPDATE: &str = "\
What can be changed, while the guest lives:
  deadline  how long each pass of a transition over the state units may take: 100ms to 10min
  on_reset  what a reset by the guest itself does: restart, stop
  log       what the guest's VMM logs: directives such as info,guest_vmm=debug

Examples:
  guestctl update web deadline 30s
  guestctl update web log debug";

/// `guestctl update`.
#[derive(Debug, Args)]
#[command(after_help = UPDATE)]
pub struct Change {
    /// The guest's id, or a unique beginning of it
    pub id: String,
    /// The node, its names joined by `/`
    pub path: String,
    /// Its new value, as `inspect` shows it
    #[arg(allow_hyphen_values = true)]
    pub value: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GraphFormat {
    /// A tree of text
    Tree,
    /// Graphviz
    Dot,
    /// A picture that a browser shows
    Svg,
}

const DEBUG: &str = "\
The guest stops when gdb connects, and goes on when it leaves: `detach`, `kill` and `quit` all let it go on; `guestctl stop` ends \
it. Its VPs are gdb's threads, VP 0 being thread 1. All stop when one does; devices and the guest's time go on meanwhile.

There are four hardware breakpoints. gdb's software breakpoints take one each as well, and are refused when none is free, so \
nothing is written into the guest's code. A host without VT-x and SVM steps and breaks in ring 0 only: elsewhere the guest gets the \
exception. Memory is what the thread's page tables show. x87 and SSE registers are unavailable; \
selectors of segments can be read only.

Example:
  guestctl debug web --gdb localhost:1234
  gdb vmlinux -ex 'target remote localhost:1234'";

const RUN: &str = "\
The guest's serial output, or that of its console, goes to the standard output, unchanged. A terminal's keys all go to the guest, Ctrl-C too, but for \
Ctrl-]: Ctrl-] q stops the guest and leaves, Ctrl-] Ctrl-] sends one Ctrl-]. Input that is no terminal is sent until its end; \
the guest then goes on. The command ends when the guest has ended and all its output was written.

With --debug-exit a guest ends itself by writing a value to port 0xf4; the exit status is then that of QEMU's isa-debug-exit, \
twice the value's low 7 bits plus 1.

--json prints one object as the last line of the standard error:
  id          the guest's id
  outcome     clean, forced, crashed; refused if it never ran; lost if the service went away too
  code        the failure's code, or null; detail: the failure in words
  log         the end of the VMM's log, after a crash of the VMM
  panic       what the guest has reported of its kernel since its last reset: panicked, crashLoaded, or null; panics: how many
              times it has reported anything of that kind
  debug_exit  what the guest wrote to its debug-exit port, or null
  lost        bytes of output that were dropped, because they were not read in time
  timings_us  launch and create (from the start), first_byte (from create's end, when run takes effect, to the first
              serial byte), total; null for what did not happen

Examples:
  guestctl run --memory 64M --cpus 4
  guestctl run --cpus 2 --cpu-affinity 0=0,1=1 --cpuid-mask 7.0:ebx=0x20    (a VP a CPU, and no AVX2)
  printf 'memory\\npoweroff\\n' | guestctl run --json
  echo debug-exit 16 | guestctl run --debug-exit; test $? = 33
  guestctl run --kernel vmlinuz --initrd initrd.gz --cmdline 'console=ttyS0 panic=-1'
  guestctl run --kernel vmlinuz --cmdline 'console=ttyS0 root=/dev/vda' --disk path=root.img,id=root
  guestctl run --disk path=data.img,bps=100M,iops=5000 --disk path=tools.img,readonly=on
  guestctl run --kernel vmlinuz --initrd initrd.gz --cmdline console=hvc0 --console ports=agent --attach console
  guestctl run --kernel vmlinuz --initrd initrd.gz --vsock path=web.sock
  guestctl run --snapshot web.snapshot --disk path=root.img                 (goes on where web was saved)
  guestctl run --snapshot evening.snapshot --snapshot-base morning.snapshot --attach console

Keep a snapshot's file as you keep the guest's disks, unchanged while guests go on from it: its memory is read when it is touched, and whoever can write to the file can change them. A disk has to be as it was when the snapshot was taken.

--vsock path=web.sock: write `CONNECT 80` and a newline to web.sock, and it is connected to the guest's port 80 once it has answered \
`OK` and the host's port; it is closed if the guest refuses. What the guest connects to at the host's port 1234 (CID 2) is the Unix \
socket web.sock_1234, if somebody listens there.";

/// What a snapshot has of its guest, and is not to be chosen beside one.
const OF_THE_SNAPSHOT: [&str; 17] = [
    "kernel",
    "initrd",
    "cmdline",
    "cpus",
    "cpu_affinity",
    "cpuid_mask",
    "memory",
    "on_reset",
    "huge_pages",
    "prefault",
    "lock_memory",
    "catch_up_time",
    "debug_exit",
    "rng",
    "balloon",
    "console",
    "mem",
];

/// `guestctl run`.
#[derive(Debug, Args)]
#[command(after_help = format!("{RUN}\n\n{NET}"))]
pub struct Run {
    /// The guest's id [default: the service chooses one]
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    pub name: String,
    /// A snapshot's file, as `snapshot save` writes it: the guest goes on from there, in place of being booted. What it has is the
    /// snapshot's; --disk and --net grant what it had of each, in their order, and --vsock the sockets
    #[arg(long, value_name = "FILE", conflicts_with_all = OF_THE_SNAPSHOT)]
    pub snapshot: Option<PathBuf>,
    /// The file that the snapshot's file is a layer of
    #[arg(long, value_name = "FILE", requires = "snapshot")]
    pub snapshot_base: Option<PathBuf>,
    /// The kernel: an ELF with a PVH note, a vmlinux or a bzImage [default: the built-in guest]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The initrd
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    pub cmdline: String,
    /// How many virtual processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// The host's CPUs that virtual processors run on: 0-1,4 for all of them, 0=0,1=2-3 for VP 0 and VP 1 [default: any]
    #[arg(long, value_name = "LIST", value_parser = cpus::affinity)]
    pub cpu_affinity: Option<VpAffinity>,
    /// Features of the host's CPU to hide, as bits of CPUID: LEAF[.SUBLEAF]:REGISTER=BITS[,REGISTER=BITS]; may be given again
    #[arg(long, value_name = "MASK", value_parser = cpus::cpuid_mask)]
    pub cpuid_mask: Vec<CpuidMask>,
    /// The guest's memory: 256M, 1G, or bytes
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = size::parse)]
    pub memory: u64,
    /// What a reset by the guest itself does
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = ResetOption::Restart)]
    pub on_reset: ResetOption,
    /// What of the guest is here: serial, its serial line; console, whose size then follows the terminal's; or port=NAME of the
    /// console
    #[arg(long, value_name = "WHAT", default_value = "serial", value_parser = Attachment::parse)]
    pub attach: Attachment,
    /// Send the guest no input
    #[arg(long)]
    pub no_stdin: bool,
    /// Print how it ended, and how long what took, as JSON on the standard error
    #[arg(long)]
    pub json: bool,
    /// Back the memory with 2 MiB pages of the host's pool
    #[arg(long)]
    pub huge_pages: bool,
    /// Touch all of the memory before the guest starts
    #[arg(long)]
    pub prefault: bool,
    /// Keep the memory from being swapped
    #[arg(long)]
    pub lock_memory: bool,
    /// Let the guest's clocks jump over the time during which it is paused
    #[arg(long)]
    pub catch_up_time: bool,
    /// Give the guest a port, 0xf4, with which it ends itself and leaves a value, for tests of kernels
    #[arg(long)]
    pub debug_exit: bool,
    /// Speak to the guest through the service, as a client does that cannot pass descriptors
    #[arg(long)]
    pub proxied: bool,
    #[command(flatten)]
    pub devices: DeviceOptions,
}

/// What of a guest's is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attachment {
    /// The serial line, ttyS0 on Linux.
    Serial,
    /// The terminal of its console, hvc0 on Linux.
    Console,
    /// A further port of its console.
    Port(String),
}

impl Attachment {
    /// Reads `serial`, `console` or `port=NAME`.
    pub fn parse(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("port=")) {
            ("serial", _) => Ok(Self::Serial),
            ("console", _) => Ok(Self::Console),
            (_, Some(name)) => Ok(Self::Port(name.to_owned())),
            _ => Err("it is none of serial, console and port=NAME".to_owned()),
        }
    }
}

impl Run {
    /// What the attachment needs and the guest is not given.
    pub fn missing(&self) -> Option<String> {
        if self.snapshot.is_some() {
            return None;
        }
        match (&self.attach, &self.devices.console) {
            (Attachment::Console, None) => Some("--attach console needs --console".to_owned()),
            (Attachment::Port(name), console) => {
                let has = console.as_ref().is_some_and(|console| console.ports.contains(name));
                (!has).then(|| format!("--attach port={name} needs --console ports={name}"))
            }
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ResetOption {
    /// The guest starts anew
    Restart,
    /// The guest ends cleanly
    Stop,
}

impl From<ResetOption> for OnReset {
    fn from(option: ResetOption) -> Self {
        match option {
            ResetOption::Restart => Self::Restart,
            ResetOption::Stop => Self::Stop,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn run(arguments: &[&str]) -> Result<Run, clap::Error> {
        let words = ["guestctl", "run"].into_iter().chain(arguments.iter().copied());
        match Options::try_parse_from(words)?.command {
            Command::Run(run) => Ok(*run),
            other => panic!("not run: {other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn run_has_its_defaults() {
        let run = run(&[]).expect("no option is needed");
        assert_eq!((run.cpus, run.memory, run.on_reset), (1, 128 << 20, ResetOption::Restart));
        assert!(!run.catch_up_time);
        assert!(run.kernel.is_none() && run.name.is_empty() && run.cmdline.is_empty());
    }

    #[test]
    fn run_takes_its_options() {
        let run = run(&[
            "--memory",
            "1G",
            "--cpus=4",
            "--on-reset",
            "stop",
            "--cmdline",
            "-x y",
            "--catch-up-time",
        ])
        .expect("valid");
        assert_eq!((run.cpus, run.memory, run.on_reset), (4, 1 << 30, ResetOption::Stop));
        assert_eq!((&*run.cmdline, run.catch_up_time), ("-x y", true));
    }

    #[test]
    fn run_takes_cpus_and_masks() {
        let run = run(&["--cpu-affinity=0=0,1=2-3", "--cpuid-mask", "7.0:ebx=1", "--cpuid-mask", "1:ecx=2"]);
        let run = run.expect("valid");
        assert_eq!(run.cpu_affinity, Some(VpAffinity::Each(vec![[0].into(), [2, 3].into()])));
        let masks: Vec<_> = run.cpuid_mask.iter().map(|mask| (mask.leaf, mask.ebx, mask.ecx)).collect();
        assert_eq!(masks, [(7, 1, 0), (1, 0, 2)]);
    }

    fn stop(arguments: &[&str]) -> Result<Stop, clap::Error> {
        let words = ["guestctl", "stop", "web"].into_iter().chain(arguments.iter().copied());
        match Options::try_parse_from(words)?.command {
            Command::Stop(stop) => Ok(stop),
            other => panic!("not stop: {other:?}"),
        }
    }

    #[test]
    fn stop_waits_only_if_it_is_to_be_graceful() {
        let asked = |arguments: &[&str]| {
            let stop = stop(arguments).expect("valid");
            (stop.graceful, stop.timeout)
        };
        assert_eq!(asked(&[]), (false, Duration::from_secs(60)));
        assert_eq!(asked(&["--graceful"]), (true, Duration::from_secs(60)));
        assert_eq!(asked(&["--graceful", "--timeout", "2min"]), (true, Duration::from_secs(120)));
        let error = stop(&["--timeout", "2min"]).expect_err("it does not wait").to_string();
        assert!(error.contains("--graceful"), "{error}");
        let error = stop(&["--graceful", "--timeout", "soon"]).expect_err("no duration").to_string();
        assert!(error.contains("whole number"), "{error}");
    }

    #[test]
    fn run_takes_a_console() {
        let ports =
            |arguments: &[&str]| run(arguments).expect("valid").devices.console.map(|console| console.ports);
        assert_eq!(ports(&[]), None);
        assert_eq!(ports(&["--console", "--rng"]), Some(vec![]));
        assert_eq!(ports(&["--console", "ports=a+b.c"]), Some(vec!["a".into(), "b.c".into()]));
        let missing = |arguments: &[&str]| run(arguments).expect("valid").missing();
        assert_eq!(missing(&["--console", "--attach", "console"]), None);
        assert_eq!(missing(&["--console", "ports=a+b", "--attach=port=b"]), None);
        assert_eq!(
            missing(&["--attach", "console"]).expect("no console"),
            "--attach console needs --console"
        );
        assert!(
            missing(&["--console", "ports=ab", "--attach", "port=a"]).expect("no port").contains("ports=a")
        );
        let text = run(&["--console", "agent"]).expect_err("no names").to_string();
        assert!(text.contains("agent") && text.contains("ports"), "{text}");
    }

    #[test]
    fn a_snapshot_has_what_it_has() {
        let with = |arguments: &[&str]| run(&[&["--snapshot", "web.snapshot"], arguments].concat());
        let options =
            ["--disk=path=a", "--net=passt", "--vsock=path=b", "--attach=console", "--proxied", "--json"];
        let granted = with(&options).expect("valid");
        assert_eq!((granted.snapshot, granted.snapshot_base), (Some("web.snapshot".into()), None));
        let command = Options::command();
        let run_command = command.find_subcommand("run").expect("run");
        for id in OF_THE_SNAPSHOT {
            let argument = run_command.get_arguments().find(|argument| argument.get_id() == id).expect(id);
            let option = format!("--{}", argument.get_long().expect("an option"));
            let value = match id {
                "cpus" | "cpu_affinity" => "=1",
                "cpuid_mask" => "=7.0:ebx=1",
                "memory" => "=1G",
                "on_reset" => "=stop",
                "kernel" | "initrd" | "cmdline" => "=x",
                "mem" => "=region=1G",
                _ => "",
            };
            let text = with(&[&format!("{option}{value}")]).expect_err(id).to_string();
            assert!(text.contains("--snapshot <FILE>") && text.contains(&option), "{text}");
        }
        let error = run(&["--snapshot-base=x"]).expect_err("of what?").to_string();
        assert!(error.contains("--snapshot <FILE>"), "{error}");
    }

    #[test]
    fn update_takes_any_value() {
        for value in ["30s", "-1", "--", ""] {
            let words = ["guestctl", "update", "web", "deadline"].into_iter().chain([value]);
            let words: Vec<_> = if value == "--" { words.chain(["--"]).collect() } else { words.collect() };
            match Options::try_parse_from(words).expect("valid").command {
                Command::Update(change) => assert_eq!((&change.id[..], &change.value[..]), ("web", value)),
                other => panic!("not update: {other:?}"),
            }
        }
        assert!(
            Options::try_parse_from(["guestctl", "update", "web", "deadline"]).is_err(),
            "a value is needed"
        );
    }

    #[test]
    fn a_bad_value_is_named() {
        for arguments in [
            ["--memory", "12X"],
            ["--cpus", "many"],
            ["--on-reset", "explode"],
            ["--cpu-affinity", "1-0"],
            ["--cpuid-mask", "7"],
            ["--attach", "ports"],
        ] {
            let text = run(&arguments).expect_err("refused").to_string();
            assert!(text.contains(arguments[0]) && text.contains(arguments[1]), "{text}");
        }
    }
}
