//! `--net`: what a network device's back end is, and how this process opens it.

use super::tap;
use crate::ending::{Outcome, Trouble};
use crate::pairs::{LIMITS, Pairs};
use guest_client::{Lifecycle, MacAddress, NetBackend, NetConfig, RateLimits};
use rustix::io::{FdFlags, fcntl_setfd};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where frames come from and go to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum BackendOption {
    /// A passt of the guest's own.
    Passt,
    /// A Unix stream socket that somebody listens on.
    Stream(PathBuf),
    /// A TAP device by its name.
    Tap(String),
    /// Descriptors that this process was started with.
    Inherited(Vec<RawFd>),
    /// A vhost-user back end's socket.
    VhostUser(PathBuf),
}

/// What one `--net` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetOption {
    backend: BackendOption,
    mac: Option<MacAddress>,
    mtu: Option<u16>,
    queues: u16,
    limits: RateLimits,
}

/// A network device whose back end is open.
pub struct OpenNet {
    mac: Option<MacAddress>,
    mtu: Option<u16>,
    limits: RateLimits,
    backend: OpenBackend,
}

enum OpenBackend {
    Tap(Vec<OwnedFd>),
    Stream(OwnedFd),
    VhostUser(OwnedFd, u16),
}

/// Reads one `--net`.
pub fn parse(text: &str) -> Result<NetOption, String> {
    let (word, rest) = text.split_once(',').unwrap_or((text, ""));
    let backend = backend(word)?;
    let pairs = Pairs::read(rest, &[&["mac", "mtu", "queues"][..], &LIMITS].concat())?;
    let mac = pairs.text("mac").map(str::parse).transpose().map_err(|error| format!("mac: {error}"))?;
    let (mtu, queues) = (pairs.number("mtu")?, pairs.number("queues")?.unwrap_or(1));
    let option = NetOption { backend, mac, mtu, queues, limits: pairs.limits()? };
    let several = matches!(option.backend, BackendOption::Tap(_) | BackendOption::VhostUser(_));
    if option.queues == 0 || option.queues > 1 && !several {
        return Err(format!("queues={}: only tap and vhost-user have more than one", option.queues));
    }
    Ok(option)
}

fn backend(word: &str) -> Result<BackendOption, String> {
    Ok(match word.split_once('=') {
        None if word == "passt" => BackendOption::Passt,
        Some(("passt", path)) if !path.is_empty() => BackendOption::Stream(path.into()),
        Some(("tap", name)) if (1..tap::NAME_BYTES).contains(&name.len()) => BackendOption::Tap(name.into()),
        Some(("tap", name)) => return Err(format!("{name:?} is no name of an interface")),
        Some(("fd", numbers)) => {
            let number =
                |text: &str| number::<RawFd>("fd", text).map(|number| (number >= 3).then_some(number));
            let numbers: Result<Option<Vec<_>>, _> = numbers.split(':').map(number).collect();
            let numbers = numbers?.ok_or("fd: 0 to 2 are the standard streams")?;
            BackendOption::Inherited(numbers)
        }
        Some(("vhost-user", path)) if !path.is_empty() => BackendOption::VhostUser(path.into()),
        _ => {
            let known = "passt, passt=SOCKET, tap=NAME, fd=N and vhost-user=SOCKET";
            return Err(format!("{word:?} is none of {known}"));
        }
    })
}

fn number<T: std::str::FromStr>(name: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{name}: {text:?} is no number that can be"))
}

impl NetOption {
    /// Opens the back end, with the user's own rights.
    pub fn open(&self) -> Outcome<OpenNet> {
        let &Self { ref backend, mac, mtu, queues, limits } = self;
        let backend = match backend {
            BackendOption::Passt => OpenBackend::Stream(passt()?),
            BackendOption::Stream(path) => OpenBackend::Stream(connect(path)?),
            BackendOption::Tap(name) => OpenBackend::Tap(open_tap(name, queues)?),
            BackendOption::Inherited(numbers) => inherited(numbers)?,
            BackendOption::VhostUser(path) => OpenBackend::VhostUser(connect(path)?, queues),
        };
        Ok(OpenNet { mac, mtu, limits, backend })
    }
}

impl OpenNet {
    /// The device in a config for this lifecycle.
    pub fn config(self, lifecycle: &Lifecycle) -> Outcome<NetConfig> {
        let Self { mac, mtu, limits, backend } = self;
        let pass = |descriptor| {
            let problem = "--net: no descriptors go through the service; leave out --proxied";
            lifecycle.descriptor(descriptor).ok_or_else(|| Trouble::Usage(problem.into()))
        };
        let backend = match backend {
            OpenBackend::Tap(queues) => {
                NetBackend::Tap(queues.into_iter().map(pass).collect::<Outcome<_>>()?)
            }
            OpenBackend::Stream(socket) => NetBackend::Stream(pass(socket)?),
            OpenBackend::VhostUser(socket, queue_pairs) => {
                NetBackend::VhostUser { socket: pass(socket)?, queue_pairs }
            }
        };
        Ok(NetConfig { mac, mtu, backend, limits })
    }
}

fn unusable(what: impl std::fmt::Display, why: impl std::fmt::Display) -> Trouble {
    Trouble::Failed(format!("--net {what}: {why}"))
}

fn connect(path: &Path) -> Outcome<OwnedFd> {
    let socket = UnixStream::connect(path).map_err(|error| unusable(path.display(), error))?;
    Ok(socket.into())
}

fn open_tap(name: &str, queues: u16) -> Outcome<Vec<OwnedFd>> {
    let queue = |_| tap::open(name, queues > 1).map_err(|error| unusable(format_args!("tap={name}"), error));
    (0..queues).map(queue).collect()
}

/// A socket is a stream, anything else is taken for a TAP device: the VMM looks closer.
fn inherited(numbers: &[RawFd]) -> Outcome<OpenBackend> {
    let own = |number: &RawFd| {
        tap::inherited(*number).map_err(|error| unusable(format_args!("fd={number}"), error))
    };
    let mut descriptors = numbers.iter().map(own).collect::<Outcome<Vec<_>>>()?;
    let is_socket = |descriptor: &OwnedFd| rustix::net::sockopt::socket_type(descriptor).is_ok();
    if descriptors.len() == 1 && is_socket(&descriptors[0]) {
        Ok(OpenBackend::Stream(descriptors.remove(0)))
    } else {
        Ok(OpenBackend::Tap(descriptors))
    }
}

/// Starts a passt for one guest. It ends when the VMM closes the connection.
fn passt() -> Outcome<OwnedFd> {
    let problem = |error: std::io::Error| unusable("passt", error);
    let (ours, its) = UnixStream::pair().map_err(problem)?;
    fcntl_setfd(&its, FdFlags::empty()).map_err(|error| problem(error.into()))?;
    let mut passt = Command::new("passt");
    passt.args(["--foreground", "--quiet", "--fd"]).arg(its.as_raw_fd().to_string());
    // Nobody waits for it: it is gone with the connection, and until then its errors are the user's.
    passt.stdin(Stdio::null()).stdout(Stdio::null()).spawn().map_err(problem)?;
    Ok(ours.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_ends_are_read() {
        for (text, backend) in [
            ("passt", BackendOption::Passt),
            ("passt=/run/passt.sock", BackendOption::Stream("/run/passt.sock".into())),
            ("tap=tap0", BackendOption::Tap("tap0".into())),
            ("fd=3", BackendOption::Inherited(vec![3])),
            ("fd=3:7", BackendOption::Inherited(vec![3, 7])),
            ("vhost-user=a", BackendOption::VhostUser("a".into())),
        ] {
            let limits = RateLimits::default();
            assert_eq!(
                parse(text),
                Ok(NetOption { backend, mac: None, mtu: None, queues: 1, limits }),
                "{text}"
            );
        }
        let all = "tap=t,mac=02:00:00:00:00:01,mtu=1400,queues=4,bps=1M,bps-burst=2M,iops=3,iops-burst=4";
        let all = parse(all).expect("valid");
        let limits = RateLimits {
            bytes_per_second: 1 << 20,
            bytes_burst: 2 << 20,
            operations_per_second: 3,
            operations_burst: 4,
        };
        assert_eq!(all.limits, limits);
        assert_eq!(all.mac, Some(MacAddress([2, 0, 0, 0, 0, 1])));
        assert_eq!((all.mtu, all.queues), (Some(1400), 4));
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (text, named) in [
            ("", "\"\""),
            ("user", "\"user\""),
            ("passt=", "\"passt=\""),
            ("tap=", "\"\""),
            ("tap=a-name-of-16-byte", "a-name-of-16-byte"),
            ("fd=2", "standard streams"),
            ("fd=3:x", "\"x\""),
            ("fd=", "fd"),
            ("tap=t,mtu=70000", "\"70000\""),
            ("tap=t,mac=1", "mac: \"1\""),
            ("tap=t,speed=1", "\"speed\""),
            ("tap=t,bps=fast", "bps"),
            ("tap=t,queues=0", "queues=0"),
            ("passt,queues=2", "queues=2"),
        ] {
            let refusal = parse(text).expect_err(text);
            assert!(refusal.contains(named), "{text}: {refusal}");
        }
    }
}
