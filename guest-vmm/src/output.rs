//! What a guest has sent through a port: kept for late readers, never in the guest's way.

use devices::ByteSink;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// How much is kept, in bytes.
pub(crate) const KEPT: usize = 64 << 10;

/// The last [`KEPT`] bytes that a port sent. Every reader has a position of its own.
#[derive(Default)]
pub(crate) struct OutputLog {
    ring: Mutex<Ring>,
    changed: Notify,
}

#[derive(Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// How many bytes came before the first one that is kept.
    dropped: u64,
    closed: bool,
}

/// A piece of output.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub bytes: Vec<u8>,
    /// How many bytes were dropped before these.
    pub lost: u64,
}

impl OutputLog {
    /// The guest sends nothing more.
    pub fn close(&self) {
        self.ring().closed = true;
        self.changed.notify_waiters();
    }

    /// A reader that begins with the oldest byte that is kept.
    pub fn position(&self) -> u64 {
        self.ring().dropped
    }

    /// What follows a position, which is moved behind it; `None` at the end.
    pub async fn next(&self, position: &mut u64) -> Option<Piece> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let ring = self.ring();
                if let Some(piece) = ring.after(position) {
                    return Some(piece);
                }
                if ring.closed {
                    return None;
                }
            }
            changed.await;
        }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn after(&self, position: &mut u64) -> Option<Piece> {
        let lost = self.dropped.saturating_sub(*position);
        let from =
            usize::try_from(*position + lost - self.dropped).expect("no further than the ring is long");
        if from == self.bytes.len() {
            return None;
        }
        let bytes: Vec<u8> = self.bytes.range(from..).copied().collect();
        *position += lost + bytes.len() as u64;
        Some(Piece { bytes, lost })
    }
}

impl ByteSink for OutputLog {
    fn write(&self, bytes: &[u8]) {
        {
            let mut ring = self.ring();
            ring.bytes.extend(bytes);
            let excess = ring.bytes.len().saturating_sub(KEPT);
            ring.bytes.drain(..excess);
            ring.dropped += excess as u64;
        }
        self.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    fn read(log: &OutputLog, position: &mut u64) -> Option<Option<Piece>> {
        log.next(position).now_or_never()
    }

    #[test]
    fn every_reader_sees_everything() {
        let log = OutputLog::default();
        let (mut one, mut other) = (log.position(), log.position());
        log.write(b"READY");
        assert_eq!(read(&log, &mut one), Some(Some(Piece { bytes: b"READY".into(), lost: 0 })));
        assert_eq!(read(&log, &mut one), None, "waits for more");
        log.write(b"\n");
        log.close();
        assert_eq!(read(&log, &mut other), Some(Some(Piece { bytes: b"READY\n".into(), lost: 0 })));
        assert_eq!(read(&log, &mut one), Some(Some(Piece { bytes: b"\n".into(), lost: 0 })));
        assert_eq!(read(&log, &mut one), Some(None), "the end");
    }

    #[test]
    fn a_slow_reader_loses_the_oldest_bytes_and_learns_how_many() {
        let log = OutputLog::default();
        let mut position = log.position();
        log.write(b"abc");
        log.write(&vec![b'x'; KEPT]);
        let Some(Some(piece)) = read(&log, &mut position) else { panic!("there is output") };
        assert_eq!((piece.bytes.len(), piece.lost), (KEPT, 3));
        let late = log.position();
        assert_eq!(late, 3, "a late reader has lost nothing that it could have known of");
    }

    #[tokio::test]
    async fn a_waiting_reader_is_woken() {
        let log = std::sync::Arc::new(OutputLog::default());
        let writer = log.clone();
        let mut position = 0;
        let (piece, ()) = tokio::join!(log.next(&mut position), async move {
            tokio::task::yield_now().await;
            std::thread::spawn(move || writer.write(b"!")).join().expect("written");
        });
        assert_eq!(piece.expect("not the end").bytes, b"!");
    }
}
