//! What a hostile peer sends: bytes of its own choice, below the RPC library.

use std::io;
use std::time::Duration;

use capnp::message::{Builder, HeapAllocator};
use capnp::serialize;
use capnp_rpc::rpc_capnp::message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long nothing has to move until a write counts as stuck.
const STUCK: Duration = Duration::from_secs(2);

/// How long a peer may take to close its end. The longest of the limits, the handshake, takes 30 s.
const CLOSING: Duration = Duration::from_secs(60);

/// A generator of numbers that are the same in every run (splitmix64).
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.roll() % end as u64).expect("below a usize")
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.roll().to_le_bytes()[0]).collect()
    }
}

/// A method: its interface's id and its number there.
#[derive(Debug, Clone, Copy)]
pub struct Method {
    pub interface: u64,
    pub number: u16,
}

fn rpc(fill: impl FnOnce(message::Builder<'_>)) -> Vec<u8> {
    let mut message: Builder<HeapAllocator> = Builder::new_default();
    fill(message.init_root());
    serialize::write_message_to_words(&message)
}

pub fn bootstrap(question: u32) -> Vec<u8> {
    rpc(|message| message.init_bootstrap().set_question_id(question))
}

/// A call on the answer of the bootstrap that was question 0. Its parameters are a struct without anything in it.
pub fn call(question: u32, method: Method) -> Vec<u8> {
    rpc(|message| {
        let mut call = message.init_call();
        call.set_question_id(question);
        call.set_interface_id(method.interface);
        call.set_method_id(method.number);
        call.reborrow().init_target().init_promised_answer().set_question_id(0);
        call.init_params();
    })
}

pub fn finish(question: u32) -> Vec<u8> {
    rpc(|message| message.init_finish().set_question_id(question))
}

fn release(export: u32) -> Vec<u8> {
    rpc(|message| {
        let mut release = message.init_release();
        release.set_id(export);
        release.set_reference_count(1);
    })
}

/// A session as an honest client has it: a bootstrap, a few calls, all of them finished, what came released.
pub fn honest_session(method: Method) -> Vec<u8> {
    let mut session = bootstrap(0);
    for question in 1..5 {
        session.extend(call(question, method));
    }
    for question in (0..5).rev() {
        session.extend(finish(question));
    }
    session.extend(release(0));
    session
}

/// The session with a few of its bytes changed.
pub fn mutated(session: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut session = session.to_vec();
    for _ in 0..=dice.below(8) {
        let place = dice.below(session.len());
        session[place] = match dice.below(3) {
            0 => dice.roll().to_le_bytes()[0],
            1 => session[place] ^ (1 << dice.below(8)),
            _ => session[place].wrapping_add(1),
        };
    }
    session
}

/// A header of one segment of so many words, and nothing behind it.
pub fn header(words: u32) -> Vec<u8> {
    [0u32.to_le_bytes(), words.to_le_bytes()].concat()
}

/// Sends all of it, or as much as the peer takes before it closes.
pub async fn send(stream: &mut UnixStream, bytes: &[u8]) {
    // A peer that has had enough closes its end in the middle of it.
    let _ = stream.write_all(bytes).await;
}

/// Reads until the peer has closed its end, and returns how many bytes came.
pub async fn closed(stream: &mut UnixStream) -> anyhow::Result<usize> {
    let mut buffer = vec![0; 64 << 10];
    let mut count = 0;
    let reading = async {
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) => return Ok(count),
                Ok(more) => count += more,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(count),
                Err(error) => return Err(error),
            }
        }
    };
    Ok(timeout(CLOSING, reading).await.map_err(|_| anyhow::anyhow!("the offender was not cut off"))??)
}

/// Sends a piece again and again, reading nothing, until the peer takes no more or has closed its end; returns the bytes sent.
pub async fn send_until_stuck(
    stream: &mut UnixStream,
    mut piece: impl FnMut(u32) -> Vec<u8>,
) -> anyhow::Result<u64> {
    let mut sent = 0;
    for round in 1..u32::MAX {
        let piece = piece(round);
        match timeout(STUCK, stream.write_all(&piece)).await {
            Ok(Ok(())) => sent += piece.len() as u64,
            Ok(Err(_)) | Err(_) => return Ok(sent),
        }
        anyhow::ensure!(sent < 1 << 30, "the peer takes calls without an end");
    }
    Ok(sent)
}
