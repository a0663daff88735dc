//! guestd, or a private service in this process for as long as the command lasts.

use crate::ending::{Outcome, Trouble};
use crate::options::Options;
use guest_client::{ConnectError, Host};
use guest_schema::chain;
use guest_service::{Service, ServiceConfig};
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use tokio::task::spawn_local;

/// A service that this command may use.
pub struct Launcher {
    /// The connection to it.
    pub host: Host,
    private: Option<Rc<Service>>,
}

impl Launcher {
    /// Ends the private service, if it is one, and what is left of its guests.
    pub async fn close(self) {
        if let Some(service) = self.private {
            service.shutdown().await;
        }
    }

    /// Where guests are launched, in words.
    pub fn describe(&self) -> &'static str {
        match self.private {
            Some(_) => "a private service in this process",
            None => "the running guestd",
        }
    }
}

/// Where the running guestd is looked for, and whether the user named the place.
struct Place {
    socket: PathBuf,
    named: bool,
}

/// The guestd that runs.
pub async fn running(options: &Options) -> Outcome<Host> {
    let place = place(options);
    Host::connect(&place.socket).await.map_err(|error| match place.named {
        true => unreachable(&error),
        false if error.nobody_there() => Trouble::Unavailable(format!(
            "no guestd runs at {}: start one there (guestd --socket PATH), or name the socket of one that runs with \
             --socket or GUESTD_SOCKET",
            place.socket.display()
        )),
        false => unreachable(&error),
    })
}

/// The guestd that runs, or a private service if none was named and none is at the usual place.
pub async fn running_or_private(options: &Options) -> Outcome<Launcher> {
    let place = place(options);
    match Host::connect(&place.socket).await {
        Ok(host) => Ok(Launcher { host, private: None }),
        Err(error) if !place.named && error.nobody_there() => private(options),
        Err(error) => Err(unreachable(&error)),
    }
}

fn unreachable(error: &ConnectError) -> Trouble {
    Trouble::Unavailable(chain(error))
}

fn place(options: &Options) -> Place {
    match &options.socket {
        Some(socket) => Place { socket: socket.clone(), named: true },
        None => Place { socket: usual_place(), named: false },
    }
}

fn usual_place() -> PathBuf {
    let user = rustix::process::geteuid();
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder).join("guestd.sock"),
        None if user.is_root() => PathBuf::from("/run/guestd/guestd.sock"),
        None => PathBuf::from(format!("/run/user/{}/guestd.sock", user.as_raw())),
    }
}

fn private(options: &Options) -> Outcome<Launcher> {
    if options.hypervisor == "kvm" {
        check_kvm()?;
    }
    let config = ServiceConfig {
        vmm: options.vmm.clone(),
        hypervisor: options.hypervisor.clone(),
        vmm_log: options.log.clone().unwrap_or_else(|| ServiceConfig::default().vmm_log),
        // It launches what it was asked for, and ends.
        warm: 0,
        ..ServiceConfig::default()
    };
    let service = Service::new(config).map_err(|error| Trouble::Unavailable(chain(&error)))?;
    let (ours, theirs) = UnixStream::pair()?;
    spawn_local(service.clone().serve(theirs, rustix::process::getuid().as_raw()));
    Ok(Launcher { host: Host::over(ours)?, private: Some(service) })
}

/// Whether this user can run guests on this host, and what to do if not.
fn check_kvm() -> Outcome {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.map(drop).map_err(|error| Trouble::Unavailable(no_kvm(&error)))
}

fn no_kvm(error: &std::io::Error) -> String {
    let advice = match error.kind() {
        ErrorKind::NotFound => {
            "this host offers no virtualisation: load the module kvm_intel or kvm_amd, switch VT-x or SVM on in the \
             firmware, or, inside a virtual machine, ask its host for nested virtualisation"
        }
        ErrorKind::PermissionDenied => {
            "this user may not use it: join the group that owns it (usually: sudo usermod -aG kvm $USER), log in again"
        }
        _ => "the host's kernel refuses it: its log (dmesg) says more",
    };
    format!("cannot open /dev/kvm: {error}: {advice}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_kvm_says_why_and_what_to_do() {
        let missing = no_kvm(&ErrorKind::NotFound.into());
        assert!(missing.contains("/dev/kvm") && missing.contains("kvm_intel"), "{missing}");
        let forbidden = no_kvm(&ErrorKind::PermissionDenied.into());
        assert!(forbidden.contains("usermod -aG kvm"), "{forbidden}");
    }
}
