//! What a guest says of its memory (VIRTIO 1.3, 5.5.6.3).
//!
//! The driver keeps one buffer with the device, filled as of some time ago. Giving it back asks for a new one, and so the buffer
//! that is there first is never an answer.

use crate::virtio::{Chain, DeviceFault};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use vm_memory::GuestMemoryMmap;

/// How many may ask at once; others are refused.
const ASKING: usize = 16;
/// More than there are kinds of statistics, of which the specification has 16.
const MAX_STATISTICS: usize = 64;

/// One figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryStatistic {
    /// What it is, by the specification's number (VIRTIO_BALLOON_S_*).
    pub tag: u16,
    /// How many: bytes or events, as its kind has it.
    pub value: u64,
}

/// Why there are no statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StatisticsError {
    /// The guest has no driver that gives any.
    #[error("the guest has no driver that gives statistics")]
    NoDriver,
    /// Too many ask at once.
    #[error("more than {ASKING} ask at once")]
    Busy,
    /// The guest does not answer.
    #[error("the guest did not answer within {0:?}")]
    Unanswered(Duration),
}

type Question = oneshot::Sender<Vec<MemoryStatistic>>;

/// Where questions come from.
#[derive(Debug, Clone)]
pub(super) struct Asking(mpsc::Sender<Question>);

impl Asking {
    pub async fn ask(&self, patience: Duration) -> Result<Vec<MemoryStatistic>, StatisticsError> {
        let (question, answer) = oneshot::channel();
        self.0.try_send(question).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => StatisticsError::Busy,
            mpsc::error::TrySendError::Closed(_) => StatisticsError::NoDriver,
        })?;
        match tokio::time::timeout(patience, answer).await {
            Ok(answer) => answer.map_err(|_| StatisticsError::NoDriver),
            Err(_) => Err(StatisticsError::Unanswered(patience)),
        }
    }
}

/// Where questions arrive, and those that the driver was asked.
#[derive(Debug)]
pub(super) struct StatisticsSource {
    questions: mpsc::Receiver<Question>,
    asked: Vec<Question>,
}

impl StatisticsSource {
    pub fn new() -> (Asking, Self) {
        let (sender, questions) = mpsc::channel(ASKING);
        (Asking(sender), Self { questions, asked: Vec::new() })
    }

    /// Waits until somebody asks. May be cancelled at any time.
    pub async fn asked(&mut self) {
        match self.questions.recv().await {
            Some(question) => self.asked.push(question),
            None => std::future::pending().await,
        }
    }

    /// Whether somebody waits for the driver's answer.
    pub fn is_asked(&self) -> bool {
        !self.asked.is_empty()
    }

    /// Answers all who wait.
    pub fn answer(&mut self, statistics: &[MemoryStatistic]) {
        for question in self.asked.drain(..) {
            // Whoever asked may have gone.
            let _ = question.send(statistics.to_vec());
        }
    }

    /// There is no answer for those who wait.
    pub fn give_up(&mut self) {
        self.asked.clear();
    }
}

/// Reads the driver's buffer.
pub(super) fn read(chain: &Chain, memory: &GuestMemoryMmap) -> Result<Vec<MemoryStatistic>, DeviceFault> {
    let mut reader = chain.readable.reader(memory)?;
    let mut statistics = Vec::new();
    while statistics.len() < MAX_STATISTICS
        && let Some([low, high]) = reader.read_obj::<[u8; 2]>()
        && let Some(value) = reader.read_obj::<[u8; 8]>()
    {
        let (tag, value) = (u16::from_le_bytes([low, high]), u64::from_le_bytes(value));
        statistics.push(MemoryStatistic { tag, value });
    }
    Ok(statistics)
}
