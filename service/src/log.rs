//! A VMM's log: passed on with its guest's id on every line, or its process's number until it has a guest, no faster than a person can read it, and its end kept.

use guest_transport::printable;
use std::cell::OnceCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::ChildStderr;

/// How much of the log is kept for the report of a crash, in bytes.
const KEPT: usize = 4 << 10;

/// The longest line; a longer one is passed on in parts.
const LINE: usize = 1 << 10;

/// How many lines are passed on at once, and how many a second in the long run: a guest can make its VMM log.
const BURST: u32 = 200;
const PER_SECOND: u32 = 20;

/// What a VMM's lines are marked with: the guest's id once there is one, and until then what no guest can be called.
pub(crate) struct Label {
    waiting: String,
    guest: OnceCell<String>,
}

impl Label {
    /// Of a process without a guest.
    pub fn new(pid: u32) -> Self {
        Self { waiting: format!("(process {pid})"), guest: OnceCell::new() }
    }

    /// Of this guest from now on; the first counts.
    pub fn name(&self, guest: &str) {
        self.guest.get_or_init(|| guest.to_owned());
    }

    pub fn is_named(&self) -> bool {
        self.guest.get().is_some()
    }

    pub fn as_str(&self) -> &str {
        self.guest.get().unwrap_or(&self.waiting)
    }
}

/// Passes a VMM's log on until it ends, and returns the end of it.
pub(crate) async fn follow_log(label: Rc<Label>, stderr: Option<ChildStderr>) -> String {
    let Some(stderr) = stderr else { return String::new() };
    let mut reader = BufReader::with_capacity(LINE, stderr);
    let mut log = Log::new(label);
    let mut line = Vec::new();
    while let Ok(buffer) = reader.fill_buf().await {
        if buffer.is_empty() {
            break;
        }
        let room = buffer.len().min(LINE - line.len());
        let (taken, complete) = match buffer[..room].iter().position(|byte| *byte == b'\n') {
            Some(end) => (end + 1, true),
            None => (room, false),
        };
        line.extend_from_slice(&buffer[..taken]);
        reader.consume(taken);
        if complete || line.len() >= LINE {
            log.line(&line);
            line.clear();
        }
    }
    if !line.is_empty() {
        log.line(&line);
    }
    log.end()
}

struct Log {
    label: Rc<Label>,
    tail: VecDeque<u8>,
    allowance: Allowance,
    suppressed: u64,
}

impl Log {
    fn new(label: Rc<Label>) -> Self {
        Self { label, tail: VecDeque::new(), allowance: Allowance::new(Instant::now()), suppressed: 0 }
    }

    fn line(&mut self, bytes: &[u8]) {
        let line = printable(String::from_utf8_lossy(bytes).trim());
        self.tail.extend(line.bytes().chain([b'\n']));
        let excess = self.tail.len().saturating_sub(KEPT);
        self.tail.drain(..excess);
        if self.allowance.take(Instant::now()) {
            self.tell_suppressed();
            pass_on(self.label.as_str(), &line);
        } else {
            self.suppressed += 1;
        }
    }

    fn tell_suppressed(&mut self) {
        match std::mem::take(&mut self.suppressed) {
            0 => {}
            lines => {
                let guest = self.label.as_str();
                tracing::warn!(target: "guest_vmm", guest, lines, "lines of the log were left out");
            }
        }
    }

    fn end(mut self) -> String {
        self.tell_suppressed();
        String::from_utf8_lossy(&Vec::from(self.tail)).into_owned()
    }
}

/// Logs a VMM's line at the level that it begins with.
fn pass_on(guest: &str, line: &str) {
    let (level, text) = line.split_once(' ').unwrap_or(("", line));
    let text = text.trim_start();
    match level {
        "ERROR" => tracing::error!(target: "guest_vmm", guest, "{text}"),
        "WARN" => tracing::warn!(target: "guest_vmm", guest, "{text}"),
        "INFO" => tracing::info!(target: "guest_vmm", guest, "{text}"),
        "DEBUG" => tracing::debug!(target: "guest_vmm", guest, "{text}"),
        "TRACE" => tracing::trace!(target: "guest_vmm", guest, "{text}"),
        _ => tracing::warn!(target: "guest_vmm", guest, "{line}"),
    }
}

/// A bucket of lines that fills again with time.
struct Allowance {
    lines: u32,
    filled: Instant,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self { lines: BURST, filled: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let step = Duration::from_secs(1) / PER_SECOND;
        while self.lines < BURST && now.duration_since(self.filled) >= step {
            self.lines += 1;
            self.filled += step;
        }
        if self.lines == BURST {
            self.filled = now;
        }
        let taken = self.lines > 0;
        self.lines = self.lines.saturating_sub(1);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_a_flood_does_not() {
        let start = Instant::now();
        let mut allowance = Allowance::new(start);
        let passed = (0..10_000).filter(|_| allowance.take(start)).count();
        assert_eq!(passed, BURST as usize);
        let later = start + Duration::from_secs(2);
        let passed = (0..10_000).filter(|_| allowance.take(later)).count();
        assert_eq!(passed, 2 * PER_SECOND as usize);
    }

    #[test]
    fn a_process_is_called_by_its_guest_once_it_has_one() {
        let label = Label::new(7);
        assert_eq!((label.as_str(), label.is_named()), ("(process 7)", false));
        label.name("one");
        assert_eq!((label.as_str(), label.is_named()), ("one", true));
    }

    #[test]
    fn the_end_of_the_log_is_kept_whatever_it_holds() {
        let mut log = Log::new(Rc::new(Label::new(7)));
        for number in 0..1000 {
            log.line(format!("INFO line {number}\u{1b}[31m\n").as_bytes());
        }
        let tail = log.end();
        assert!(tail.ends_with("INFO line 999 [31m\n"), "{tail}");
        assert!(tail.len() <= KEPT, "{}", tail.len());
    }
}
