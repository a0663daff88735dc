//! `--vsock`: the guest's vsock device, and Unix sockets for programs that want its streams as bytes.
//!
//! A program that connects to the socket says `CONNECT PORT` in a line, and has the guest's port once it has read `OK PORT`, the
//! host's port, in a line. A guest that connects to the host's port N is connected to the socket whose path ends in `_N`.

use crate::ending::{Outcome, Trouble};
use guest_client::{
    VsockConfig, VsockEndpoint, VsockInput, VsockOutput, VsockRequest, VsockRequests, VsockStream,
    vsock_acceptor,
};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinSet, spawn_local};

/// How many bytes are read at once.
const CHUNK: usize = 64 << 10;

/// The longest first line: `CONNECT `, ten digits and an end of line are 20 bytes.
const MAX_LINE: usize = 32;

/// How long a program may take to say where it wants to go.
const FIRST_LINE: Duration = Duration::from_secs(10);

/// The value of `--vsock`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VsockOption {
    /// Where the socket is to be.
    path: Option<PathBuf>,
}

impl FromStr for VsockOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            _ if text.is_empty() => Ok(Self::default()),
            Some(("path", path)) if !path.is_empty() => Ok(Self { path: Some(path.into()) }),
            _ => Err(format!("{text:?} is not path=SOCKET")),
        }
    }
}

/// The sockets of a guest on this side.
pub struct Bridge {
    socket: Option<Socket>,
    requests: Option<VsockRequests>,
    tasks: JoinSet<()>,
}

/// A listening socket, removed when it is dropped.
struct Socket {
    listener: Option<UnixListener>,
    path: PathBuf,
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Bridge {
    /// Listens on the socket, if there is to be one. A file that is there already stays there, and is an error.
    pub fn open(option: &VsockOption) -> Outcome<Self> {
        let socket = option.path.clone().map(Socket::listen).transpose()?;
        Ok(Self { socket, requests: None, tasks: JoinSet::new() })
    }

    /// The device.
    pub fn config(&mut self) -> VsockConfig {
        if self.socket.is_none() {
            return VsockConfig::default();
        }
        let (acceptor, requests) = vsock_acceptor();
        self.requests = Some(requests);
        VsockConfig { unclaimed: Some(acceptor), ..VsockConfig::default() }
    }

    /// Connects both sides, for as long as the bridge is held.
    pub fn serve(&mut self, endpoint: VsockEndpoint) {
        let Some(socket) = &mut self.socket else { return };
        if let Some(listener) = socket.listener.take() {
            self.tasks.spawn_local(to_guest(listener, endpoint));
        }
        if let Some(requests) = self.requests.take() {
            self.tasks.spawn_local(from_guest(requests, socket.path.clone()));
        }
    }
}

impl Socket {
    fn listen(path: PathBuf) -> Outcome<Self> {
        let listener = UnixListener::bind(&path)
            .map_err(|error| Trouble::Usage(format!("--vsock path={}: {error}", path.display())))?;
        Ok(Self { listener: Some(listener), path })
    }
}

async fn to_guest(listener: UnixListener, endpoint: VsockEndpoint) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(spawn_local(connect(stream, endpoint.clone()))),
            // Too many descriptors, say: later there may be fewer.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Connects a program to the guest's port that it names; closes it if that cannot be.
async fn connect(mut stream: UnixStream, endpoint: VsockEndpoint) {
    let Ok(Some(port)) = tokio::time::timeout(FIRST_LINE, wanted_port(&mut stream)).await else { return };
    let Ok(vsock) = endpoint.connect(port).await else { return };
    let answer = format!("OK {}\n", vsock.host_port);
    if stream.write_all(answer.as_bytes()).await.is_ok() {
        join(stream, vsock).await;
    }
}

/// Reads a line, and no byte beyond it: what follows is the guest's.
async fn wanted_port(stream: &mut UnixStream) -> Option<u32> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') && line.len() < MAX_LINE {
        line.push(stream.read_u8().await.ok()?);
    }
    let line = std::str::from_utf8(&line).ok()?;
    line.strip_prefix("CONNECT ")?.trim_end().parse().ok()
}

async fn from_guest(mut requests: VsockRequests, path: PathBuf) {
    while let Some(request) = requests.next().await {
        spawn_local(answer(request, path.clone()));
    }
}

/// Connects the guest to a program, if there is one.
async fn answer(request: VsockRequest, path: PathBuf) {
    if let Ok(stream) = UnixStream::connect(of_port(&path, request.host_port)).await {
        join(stream, request.accept()).await;
    }
}

fn of_port(path: &Path, port: u32) -> PathBuf {
    let mut path: OsString = path.into();
    path.push(format!("_{port}"));
    path.into()
}

/// Carries bytes both ways until both ways have ended; if one fails, so does the other.
async fn join(stream: UnixStream, vsock: VsockStream) {
    let (read, write) = stream.into_split();
    let VsockStream { input, output, .. } = vsock;
    let _ = tokio::try_join!(into_guest(read, input), out_of_guest(output, write));
}

/// A way failed: both ends learn of it when what they have is dropped.
struct Broken;

async fn into_guest(mut stream: OwnedReadHalf, input: VsockInput) -> Result<(), Broken> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match stream.read(&mut buffer).await.map_err(|_| Broken)? {
            0 => return input.end().await.map_err(|_| Broken),
            count => input.write(&buffer[..count]).await.map_err(|_| Broken)?,
        }
    }
}

async fn out_of_guest(mut output: VsockOutput, mut stream: OwnedWriteHalf) -> Result<(), Broken> {
    while let Some(bytes) = output.read().await.map_err(|_| Broken)? {
        stream.write_all(&bytes).await.map_err(|_| Broken)?;
    }
    stream.shutdown().await.map_err(|_| Broken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_has_a_path_or_nothing() {
        assert_eq!("".parse(), Ok(VsockOption::default()));
        assert_eq!("path=a=b".parse(), Ok(VsockOption { path: Some("a=b".into()) }));
        assert_eq!("pth=a".parse::<VsockOption>(), Err("\"pth=a\" is not path=SOCKET".to_owned()));
        assert!("path=".parse::<VsockOption>().is_err());
    }

    #[tokio::test]
    async fn a_first_line_names_a_port_and_leaves_the_rest() {
        for (text, port) in
            [("CONNECT 80\nrest", Some(80)), ("CONNECT x\n", None), ("GET / HTTP/1.1\r\n", None)]
        {
            let (mut program, mut bridge) = UnixStream::pair().expect("sockets");
            program.write_all(text.as_bytes()).await.expect("room");
            drop(program);
            assert_eq!(wanted_port(&mut bridge).await, port, "{text}");
            if port.is_some() {
                let mut rest = String::new();
                bridge.read_to_string(&mut rest).await.expect("text");
                assert_eq!(rest, "rest");
            }
        }
    }
}
