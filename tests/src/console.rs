//! A guest's serial port, as a test reads it.

use std::cell::RefCell;
use std::rc::Rc;

use guest_client::{OutputClosed, SerialOutput};
use tokio::sync::Notify;

use crate::service::PATIENCE;

#[derive(Default)]
struct Shared {
    bytes: RefCell<Vec<u8>>,
    lost: RefCell<u64>,
    ended: RefCell<bool>,
    changed: Notify,
}

/// Collects what a guest writes.
#[derive(Clone, Default)]
pub struct Console(Rc<Shared>);

/// A text did not come.
#[derive(Debug, thiserror::Error)]
#[error("the guest did not write {wanted:?}; it wrote: {text}")]
pub struct NotWritten {
    /// What was waited for.
    pub wanted: String,
    /// What came.
    pub text: String,
}

impl Console {
    /// The end that the guest writes to; the output has ended when it is dropped.
    pub fn writer(&self) -> ConsoleWriter {
        ConsoleWriter(self.clone())
    }

    /// All text so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.bytes.borrow()).into_owned()
    }

    /// How many bytes were lost because this reader was too slow.
    pub fn lost(&self) -> u64 {
        *self.0.lost.borrow()
    }

    /// Waits until the guest has written a text.
    pub async fn saw(&self, wanted: &str) -> Result<(), NotWritten> {
        self.saw_times(wanted, 1).await
    }

    /// Waits until the guest has written a text so many times.
    pub async fn saw_times(&self, wanted: &str, times: usize) -> Result<(), NotWritten> {
        let seen = || self.text().matches(wanted).count() >= times;
        self.until(|| seen() || *self.0.ended.borrow()).await;
        if seen() { Ok(()) } else { Err(NotWritten { wanted: wanted.to_owned(), text: self.text() }) }
    }

    /// Waits until the guest will write nothing more, and returns all text.
    pub async fn whole(&self) -> Result<String, NotWritten> {
        self.until(|| *self.0.ended.borrow()).await;
        let ended = *self.0.ended.borrow();
        if ended { Ok(self.text()) } else { Err(NotWritten { wanted: "the end".into(), text: self.text() }) }
    }

    async fn until(&self, condition: impl Fn() -> bool) {
        let waiting = async {
            while !condition() {
                self.0.changed.notified().await;
            }
        };
        // Whether it came in time, the caller sees by looking.
        let _ = tokio::time::timeout(PATIENCE, waiting).await;
    }
}

/// See [`Console::writer`].
pub struct ConsoleWriter(Console);

impl SerialOutput for ConsoleWriter {
    async fn write(&self, bytes: &[u8], lost: u64) -> Result<(), OutputClosed> {
        self.0.0.bytes.borrow_mut().extend_from_slice(bytes);
        *self.0.0.lost.borrow_mut() += lost;
        self.0.0.changed.notify_waiters();
        self.0.0.changed.notify_one();
        Ok(())
    }
}

impl Drop for ConsoleWriter {
    fn drop(&mut self) {
        *self.0.0.ended.borrow_mut() = true;
        self.0.0.changed.notify_waiters();
        self.0.0.changed.notify_one();
    }
}
