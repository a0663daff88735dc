//! Logs that a guest can trigger, at a bounded rate.

use std::time::{Duration, Instant};

/// How many lines are let through at once.
const BURST: u32 = 8;
/// How long it takes until so many more are.
const PERIOD: Duration = Duration::from_secs(10);

/// Lets eight lines through every ten seconds, and counts the others.
#[derive(Debug)]
pub struct LogLimit {
    since: Instant,
    allowed: u32,
    suppressed: u64,
}

impl Default for LogLimit {
    fn default() -> Self {
        Self { since: Instant::now(), allowed: BURST, suppressed: 0 }
    }
}

impl LogLimit {
    /// Whether a line may be written now; if so, how many were kept back since the last one.
    pub fn admit(&mut self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.since) >= PERIOD {
            (self.since, self.allowed) = (now, BURST);
        }
        match self.allowed.checked_sub(1) {
            Some(rest) => {
                self.allowed = rest;
                Some(std::mem::take(&mut self.suppressed))
            }
            None => {
                self.suppressed += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_let_through_and_the_rest_is_counted() {
        let mut limit = LogLimit::default();
        let start = limit.since;
        let mut at = |after| limit.admit_at(start + after);
        let early: Vec<_> = (0..10).map(|_| at(Duration::ZERO)).collect();
        assert_eq!(early, [vec![Some(0); 8], vec![None; 2]].concat());
        assert_eq!(at(PERIOD - Duration::from_nanos(1)), None);
        assert_eq!(at(PERIOD), Some(3));
        assert_eq!(at(PERIOD), Some(0));
    }
}
