//! What a process writes, collected by a thread of its own so that the process never blocks on a full pipe.
//!
//! Limit: everything is kept in memory until it is taken or the [`Output`] goes away.

use std::io::{self, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A growing record of one stream. Clones share the record.
#[derive(Clone, Debug)]
pub struct Output {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

/// Why [`Output::take`] found nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TakeError {
    /// The limit passed first.
    #[error("nothing came within {0:?}")]
    Late(Duration),
    /// The stream ended first: whoever wrote to it has closed it or is gone.
    #[error("the stream ended")]
    Ended,
}

impl Output {
    /// Collects `reader` until its end on a thread of its own. A read error counts as the end.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn collect(reader: impl Read + Send + 'static) -> io::Result<Output> {
        let shared = Arc::<Shared>::default();
        let record = Arc::clone(&shared);
        std::thread::Builder::new().name("output".to_owned()).spawn(move || record.fill(reader))?;
        Ok(Output { shared })
    }

    /// All bytes that came and were not taken.
    pub fn bytes(&self) -> Vec<u8> {
        self.shared.lock().bytes.clone()
    }

    /// [`Output::bytes`] as text; what is not UTF-8 is replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().bytes).into_owned()
    }

    /// The last `lines` lines of [`Output::text`].
    pub fn tail(&self, lines: usize) -> String {
        let text = self.text();
        let mut last: Vec<&str> = text.lines().rev().take(lines).collect();
        last.reverse();
        last.join("\n")
    }

    /// Offers the bytes that are there to `take`, now and whenever more arrive, until it returns a value. `take` may
    /// remove bytes; those are gone for everyone.
    ///
    /// # Errors
    /// [`TakeError`] when `limit` passes or the stream ends without a value.
    pub fn take<T>(
        &self,
        limit: Duration,
        mut take: impl FnMut(&mut Vec<u8>) -> Option<T>,
    ) -> Result<T, TakeError> {
        let start = Instant::now();
        let mut state = self.shared.lock();
        loop {
            if let Some(value) = take(&mut state.bytes) {
                return Ok(value);
            }
            let left = limit.saturating_sub(start.elapsed());
            if state.ended {
                return Err(TakeError::Ended);
            }
            if left.is_zero() {
                return Err(TakeError::Late(limit));
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the text contains `needle`, and returns the text. Nothing is taken.
    ///
    /// # Errors
    /// As [`Output::take`].
    pub fn contains(&self, needle: &str, limit: Duration) -> Result<String, TakeError> {
        self.take(limit, |bytes| {
            let text = String::from_utf8_lossy(bytes);
            text.contains(needle).then(|| text.into_owned())
        })
    }

    /// Waits for the end of the stream, and returns all bytes.
    ///
    /// # Errors
    /// [`TakeError::Late`] when it does not end within `limit`.
    pub fn to_end(&self, limit: Duration) -> Result<Vec<u8>, TakeError> {
        match self.take(limit, |_| None::<()>) {
            Err(TakeError::Late(limit)) => Err(TakeError::Late(limit)),
            _ => Ok(self.bytes()),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The record stays usable when a caller's closure panicked: a test that fails must not hide the others.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self, mut reader: impl Read) {
        let mut buffer = [0; 16 * 1024];
        loop {
            match reader.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => break,
                Ok(count) => self.lock().bytes.extend_from_slice(&buffer[..count]),
            }
            self.changed.notify_all();
        }
        self.lock().ended = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn what_arrives_is_offered_until_it_suffices() {
        let (reader, mut writer) = io::pipe().unwrap();
        let output = Output::collect(reader).unwrap();
        writer.write_all(b"one\n").unwrap();
        assert_eq!(output.contains("one", LONG).unwrap(), "one\n");
        writer.write_all(b"two\nthree\n").unwrap();
        let taken = output.take(LONG, |bytes| (bytes.len() == 14).then(|| bytes.split_off(8)));
        assert_eq!(taken.unwrap(), b"three\n");
        assert_eq!(output.tail(1), "two");
    }

    #[test]
    fn lateness_and_the_end_are_told_apart() {
        let (reader, writer) = io::pipe().unwrap();
        let output = Output::collect(reader).unwrap();
        let limit = Duration::from_millis(5);
        assert_eq!(output.contains("never", limit), Err(TakeError::Late(limit)));
        drop(writer);
        assert_eq!(output.contains("never", LONG), Err(TakeError::Ended));
        assert_eq!(output.to_end(LONG).unwrap(), b"");
    }
}
