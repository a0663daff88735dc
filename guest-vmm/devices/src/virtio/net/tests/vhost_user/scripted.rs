//! A back end that speaks the protocol as it is told to, and serves nothing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

pub const GET_FEATURES: u32 = 1;
pub const SET_MEM_TABLE: u32 = 5;
pub const GET_VRING_BASE: u32 = 11;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;

/// Bits of a message's flags: the version, that it is an answer, that it wants one.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// What it does with a request.
pub enum Answer {
    /// As a good back end would, with this value.
    Value(u64),
    /// It sends these bytes and nothing else.
    Bytes(Vec<u8>),
    /// Nothing, from now on, but the connection stays.
    Silence,
}

/// Answers each request as `script` says, until the connection ends; `script` gets the request and its body.
pub fn back_end(script: impl FnMut(u32, &[u8]) -> Answer + Send + 'static) -> (JoinHandle<()>, UnixStream) {
    let (ours, its) = UnixStream::pair().expect("a pair");
    let thread = std::thread::spawn(move || {
        // The connection's end, whatever it looks like.
        let _ = serve(its, script);
    });
    (thread, ours)
}

/// What a good back end with all features and four queues says.
pub fn honest(request: u32, body: &[u8]) -> Answer {
    Answer::Value(match request {
        GET_FEATURES => super::OFFERED,
        GET_PROTOCOL_FEATURES => super::PROTOCOL.bits(),
        GET_QUEUE_NUM => 4,
        // Of the queue that was asked for: it has taken nothing.
        GET_VRING_BASE => u64::from(body[0]),
        _ => 0,
    })
}

fn serve(mut socket: UnixStream, mut script: impl FnMut(u32, &[u8]) -> Answer) -> std::io::Result<()> {
    loop {
        let mut head = [0; 12];
        socket.read_exact(&mut head)?;
        let [request, flags, size] =
            [0, 4, 8].map(|at| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes")));
        let mut body = vec![0; size.try_into().expect("it fits")];
        socket.read_exact(&mut body)?;
        let asks = matches!(request, GET_FEATURES | GET_PROTOCOL_FEATURES | GET_QUEUE_NUM | GET_VRING_BASE);
        match script(request, &body) {
            Answer::Value(value) if asks || flags & NEED_REPLY != 0 => {
                let head = [request, VERSION | REPLY, 8].map(u32::to_le_bytes).concat();
                socket.write_all(&[&head[..], &value.to_le_bytes()].concat())?;
            }
            Answer::Value(_) => {}
            Answer::Bytes(bytes) => socket.write_all(&bytes)?,
            Answer::Silence => drop(socket.read_to_end(&mut Vec::new())?),
        }
    }
}
