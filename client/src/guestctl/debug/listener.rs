//! Where gdb comes in: a TCP port or a Unix socket.

use rustix::fs::Mode;
use rustix::process::umask;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};

/// Where to wait for gdb.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gdb {
    /// A host and a port.
    Tcp(String),
    /// A Unix socket, for this user alone.
    Unix(PathBuf),
}

/// A path has a slash in it. What else is wrong is said when it is used.
impl FromStr for Gdb {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            path if path.contains('/') => Self::Unix(path.into()),
            port if port.starts_with(':') => Self::Tcp(format!("localhost{port}")),
            address => Self::Tcp(address.to_owned()),
        })
    }
}

impl fmt::Display for Gdb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// A connection to gdb.
pub trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

/// A socket that waits for gdb. A Unix socket's file goes away with it.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    pub async fn bind(gdb: &Gdb) -> io::Result<Self> {
        match gdb {
            Gdb::Tcp(address) => Ok(Self::Tcp(TcpListener::bind(address).await?)),
            Gdb::Unix(path) => {
                let before = umask(Mode::RWXG | Mode::RWXO);
                let bound = UnixListener::bind(path);
                umask(before);
                Ok(Self::Unix(bound?, path.clone()))
            }
        }
    }

    /// Where it waits, as gdb's `target remote` takes it.
    pub fn place(&self) -> io::Result<String> {
        match self {
            Self::Tcp(listener) => Ok(listener.local_addr()?.to_string()),
            Self::Unix(_, path) => Ok(path.display().to_string()),
        }
    }

    pub async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Packets are small, and each is waited for.
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }
            Self::Unix(listener, _) => Ok(Box::new(listener.accept().await?.0)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // It may be gone already.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_port_or_a_path() {
        let parse = |text: &str| text.parse::<Gdb>().expect("any text is one");
        assert_eq!(parse("localhost:1234"), Gdb::Tcp("localhost:1234".into()));
        assert_eq!(parse(":1234"), Gdb::Tcp("localhost:1234".into()));
        assert_eq!(parse("[::1]:0"), Gdb::Tcp("[::1]:0".into()));
        assert_eq!(parse("./gdb.sock"), Gdb::Unix("./gdb.sock".into()));
    }
}
