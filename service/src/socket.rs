//! The socket that the service listens on.

use rustix::fs::{FlockOperation, Mode, OFlags};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use tokio::net::UnixListener;

/// Why the service cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another service answers there.
    #[error("socket {path}: another guestd listens there")]
    Live {
        /// The socket.
        path: String,
    },
    /// Something that is no socket is in its place.
    #[error("socket {path}: there is a file that is no socket; it was left alone")]
    NoSocket {
        /// The path.
        path: String,
    },
    /// The system refused.
    #[error("socket {path}: {what}")]
    System {
        /// The socket.
        path: String,
        /// What was being done.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A listening socket; its path goes away with it, and so does the lock beside it.
pub struct Listening {
    listener: UnixListener,
    path: PathBuf,
    /// Held for as long as the service listens: tells a live service from one that left its socket behind.
    _lock: OwnedFd,
}

impl Listening {
    /// The next client, and its user.
    pub async fn accept(&self) -> io::Result<(UnixStream, u32)> {
        let (stream, _) = self.listener.accept().await?;
        let uid = stream.peer_cred()?.uid();
        Ok((stream.into_std()?, uid))
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // Whoever removed them before has done no harm. The lock goes last, still held.
        let _ = std::fs::remove_file(&self.path);
        let _ = std::fs::remove_file(lock_path(&self.path));
    }
}

/// Listens on a Unix socket of mode 0600. The socket of a service that is gone is replaced; that of a live one is left alone.
pub fn listen(path: &Path) -> Result<Listening, ListenError> {
    let name = path.display().to_string();
    let system = |what: &'static str| {
        let path = name.clone();
        move |source: io::Error| ListenError::System { path, what, source }
    };
    let lock = lock(path).map_err(|error| match error.kind() {
        ErrorKind::WouldBlock => ListenError::Live { path: name.clone() },
        _ => system("its lock file cannot be taken")(error),
    })?;
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(system("cannot be looked at")(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(ListenError::NoSocket { path: name }),
        Ok(_) if UnixStream::connect(path).is_ok() => return Err(ListenError::Live { path: name }),
        Ok(_) => std::fs::remove_file(path).map_err(system("the stale one cannot be removed"))?,
    }
    // The mode is right from the start: nobody can connect between bind and a later chmod.
    let mask = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(mask);
    let listener = bound.map_err(system("cannot be bound"))?;
    Ok(Listening { listener, path: path.to_owned(), _lock: lock })
}

/// Takes the lock beside the socket, or fails with `WouldBlock`.
fn lock(path: &Path) -> io::Result<OwnedFd> {
    let name = lock_path(path);
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    loop {
        let file = rustix::fs::open(&name, flags, Mode::RUSR | Mode::WUSR)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        // Whoever held it before may have removed it meanwhile: then this is the lock of nothing.
        let held = rustix::fs::fstat(&file)?.st_ino;
        if rustix::fs::stat(&name).is_ok_and(|there| there.st_ino == held) {
            return Ok(file);
        }
    }
}

fn lock_path(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".lock");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("guestd.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
        assert!(path.exists(), "a stale socket");
        let listening = listen(&path).expect("replaced");
        let mode = std::fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(listen(&path), Err(ListenError::Live { .. })));
        drop(listening);
        assert!(!path.exists(), "removed with its service");
        assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0, "nothing is left behind");
        listen(&path).expect("free again");
    }

    #[tokio::test]
    async fn a_foreign_listener_and_a_plain_file_are_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("guestd.sock");
        let foreign = std::os::unix::net::UnixListener::bind(&path).expect("bound");
        assert!(matches!(listen(&path), Err(ListenError::Live { .. })));
        drop(foreign);
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, "notes").expect("written");
        assert!(matches!(listen(&path), Err(ListenError::NoSocket { .. })));
        assert_eq!(std::fs::read_to_string(&path).expect("still there"), "notes");
    }
}
