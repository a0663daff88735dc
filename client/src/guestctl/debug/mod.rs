//! `guestctl debug`: a guest for gdb, over the GDB remote protocol.
//!
//! gdbstub speaks the protocol, on a thread of its own since it waits for every answer; this thread has the sockets and the guest's
//! debugger. `target` is the guest as gdbstub sees it, `registers` and `breakpoints` what belongs to it, `listener` where gdb comes in.
//!
//! Limits: all VPs stop when one does. If several stop at once, gdb hears of one; the others hit their breakpoints again.

mod breakpoints;
mod listener;
mod registers;
mod target;

pub use listener::Gdb;

use crate::ending::{Outcome, Trouble};
use crate::out::Out;
use crate::signals::Signals;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub};
use guest_client::{ClientError, Control, DebugHalt, Host};
use listener::Listener;
use std::io;
use target::{GuestTarget, Wish};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::{JoinError, spawn_blocking, spawn_local};

/// How much may wait for gdb's thread: reads of its socket, or halts.
const WAITING: usize = 16;

/// How much is read of gdb's socket at once.
const PIECE: usize = 4096;

/// Serves one gdb after the other until the guest ends or a signal comes; the guest goes on then.
pub async fn debug(host: &Host, id: &str, gdb: &Gdb, out: &Out) -> Outcome {
    let found = host.find(id).await?;
    let mut signals = Signals::watch()?;
    let listener = Listener::bind(gdb)
        .await
        .map_err(|error| Trouble::Failed(format!("cannot wait for gdb at {gdb}: {error}")))?;
    let place = listener.place()?;
    out.write(format!("waiting for gdb: target remote {place}\n").as_bytes())?;
    let serve = async {
        loop {
            let stream = listener.accept().await?;
            out.write(b"a gdb has connected\n")?;
            let said = match Box::pin(serve(&found.control, stream)).await {
                Ok(how) => format!("{how}\n"),
                Err(error) => format!("gdb was left: {error}\n"),
            };
            out.write(said.as_bytes())?;
        }
    };
    let ended = found.exit.terminated();
    tokio::pin!(serve, ended);
    // A gdb that is connected hears of the guest's end before this command ends.
    tokio::select! {
        biased;
        signal = signals.next() => Err(Trouble::Interrupted(signal)),
        served = &mut serve => served,
        exit = &mut ended => {
            let exit = exit?;
            let last_words = tokio::time::timeout(LAST_WORDS, serve);
            tokio::select! {
                _ = last_words => {}
                signal = signals.next() => return Err(Trouble::Interrupted(signal)),
            }
            out.write(format!("the guest has ended: {}\n", exit.outcome.name()).as_bytes())
        }
    }
}

/// How long gdb may take to hear that the guest has ended.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_millis(500);

/// Why a gdb is not served any more.
#[derive(Debug, thiserror::Error)]
enum Left {
    #[error(transparent)]
    Guest(#[from] ClientError),
    #[error("its connection failed: {0}")]
    Connection(#[from] io::Error),
    #[error("{0}")]
    Protocol(String),
    #[error("its thread failed: {0}")]
    Thread(#[from] JoinError),
}

/// What gdb's thread is told.
enum Input {
    Bytes(Vec<u8>),
    Halt(DebugHalt),
}

/// Serves one gdb: the guest stops for it, and goes on when this ends, however it does.
async fn serve(control: &Control, stream: impl AsyncRead + AsyncWrite) -> Result<&'static str, Left> {
    let (halt, halts) = mpsc::channel(WAITING);
    let debugger = control.debugger(halt);
    debugger.opened().await?;
    let stopped = debugger.stop();
    let vps = debugger.vps().await?;
    stopped.await?;
    let (wish, mut wishes) = mpsc::unbounded_channel::<Wish>();
    let (input, inputs) = mpsc::channel(WAITING);
    let (output, outputs) = mpsc::unbounded_channel();
    let target = GuestTarget::new(wish, &vps);
    let speaking = spawn_blocking(move || speak(target, Output { bytes: Vec::new(), sent: output }, inputs));
    let (reader, writer) = tokio::io::split(stream);
    let granting = async {
        while let Some(wish) = wishes.recv().await {
            spawn_local(wish(&debugger));
        }
        std::future::pending().await
    };
    tokio::select! {
        // What is left to write when the thread has ended is written before anything else is seen.
        written = write(writer, outputs) => {
            written?;
        }
        read = read(reader, input.clone()) => {
            read?;
            return Ok("gdb has gone, the guest goes on");
        }
        () = forward(halts, input) => {}
        () = granting => {}
    }
    speaking.await?
}

async fn read(reader: impl AsyncRead, input: mpsc::Sender<Input>) -> io::Result<()> {
    tokio::pin!(reader);
    let mut piece = vec![0; PIECE];
    loop {
        let count = reader.read(&mut piece).await?;
        if count == 0 || input.send(Input::Bytes(piece[..count].to_vec())).await.is_err() {
            return Ok(());
        }
    }
}

async fn write(writer: impl AsyncWrite, mut outputs: mpsc::UnboundedReceiver<Vec<u8>>) -> io::Result<()> {
    tokio::pin!(writer);
    while let Some(bytes) = outputs.recv().await {
        writer.write_all(&bytes).await?;
        writer.flush().await?;
    }
    Ok(())
}

/// Never resolves: the guest's end is followed by that of gdb's thread.
async fn forward(mut halts: mpsc::Receiver<DebugHalt>, input: mpsc::Sender<Input>) {
    while let Some(halt) = halts.recv().await {
        if input.send(Input::Halt(halt)).await.is_err() {
            break;
        }
    }
    std::future::pending().await
}

/// What gdbstub writes, in pieces.
struct Output {
    bytes: Vec<u8>,
    sent: mpsc::UnboundedSender<Vec<u8>>,
}

impl Connection for Output {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.bytes.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let sent = self.sent.send(std::mem::take(&mut self.bytes));
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

type State<'a> = GdbStubStateMachine<'a, GuestTarget, Output>;

/// Speaks with one gdb, to the end. Blocks.
fn speak(
    mut target: GuestTarget,
    output: Output,
    mut inputs: mpsc::Receiver<Input>,
) -> Result<&'static str, Left> {
    let broken = |error: &dyn std::fmt::Display| Left::Protocol(format!("it was not understood: {error}"));
    let mut state = GdbStub::new(output).run_state_machine(&mut target).map_err(|error| broken(&error))?;
    let mut ended = None;
    loop {
        // Between two of gdb's commands only the guest's end is of interest.
        if let (State::Running(_), Some(exit)) = (&state, &ended) {
            state = tell(state, &mut target, exit)?;
        }
        if let State::CtrlCInterrupt(inner) = state {
            let reason = target.interrupt()?;
            state = inner.interrupt_handled(&mut target, Some(reason)).map_err(|error| broken(&error))?;
            continue;
        }
        if let State::Disconnected(inner) = &state {
            return Ok(match inner.get_reason() {
                DisconnectReason::TargetExited(_) | DisconnectReason::TargetTerminated(_) => {
                    "gdb has heard of the guest's end"
                }
                DisconnectReason::Disconnect | DisconnectReason::Kill => "gdb has left, the guest goes on",
            });
        }
        match inputs.blocking_recv() {
            None => return Ok("gdb has gone, the guest goes on"),
            Some(Input::Bytes(bytes)) => {
                for byte in bytes {
                    state = hear(state, &mut target, byte)?;
                }
            }
            Some(Input::Halt(halt @ DebugHalt::Terminated(_))) => ended = Some(halt),
            Some(Input::Halt(halt)) => state = tell(state, &mut target, &halt)?,
        }
    }
}

/// Hands gdbstub a byte.
fn hear<'a>(state: State<'a>, target: &mut GuestTarget, byte: u8) -> Result<State<'a>, Left> {
    let heard = match state {
        State::Idle(inner) => inner.incoming_data(target, byte),
        State::Running(inner) => inner.incoming_data(target, byte),
        State::CtrlCInterrupt(inner) => {
            let reason = target.interrupt()?;
            let state = inner.interrupt_handled(target, Some(reason));
            return hear(state.map_err(|error| Left::Protocol(error.to_string()))?, target, byte);
        }
        State::Disconnected(_) => return Ok(state),
    };
    heard.map_err(|error| Left::Protocol(error.to_string()))
}

/// Tells gdb of a halt, if it waits for one.
fn tell<'a>(state: State<'a>, target: &mut GuestTarget, halt: &DebugHalt) -> Result<State<'a>, Left> {
    let State::Running(inner) = state else { return Ok(state) };
    match target.stop_reason(halt) {
        Some(reason) => inner.report_stop(target, reason).map_err(|error| Left::Protocol(error.to_string())),
        None => Ok(State::Running(inner)),
    }
}
