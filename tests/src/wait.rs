//! Waiting for a condition with a deadline, instead of sleeping and hoping.
//!
//! Parts: [`until`] and [`found`] block the calling thread, [`until_async`] and [`found_async`] need a tokio runtime
//! with its timer. The condition is asked at once, then at intervals that grow from 1 ms to 50 ms, and a last time at
//! the deadline. Limit: a condition that blocks is not interrupted.

use std::fmt::Display;
use std::time::{Duration, Instant};

const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// A condition that did not hold by its deadline.
#[derive(Debug, Clone, thiserror::Error)]
#[error("waited {waited:?} in vain for {what}; last seen: {seen}")]
pub struct WaitError {
    /// What was waited for, in the words of the caller.
    pub what: String,
    /// How long was waited.
    pub waited: Duration,
    /// What the condition said when it was asked last.
    pub seen: String,
}

/// Waits until `condition` holds.
///
/// # Errors
/// [`WaitError`] when it does not hold within `limit`.
pub fn until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Result<(), WaitError> {
    found(what, limit, || held(condition()))
}

/// Waits until `probe` finds its value, and returns it. While it is not there, `probe` says what it sees instead.
///
/// # Errors
/// [`WaitError`] with what `probe` saw last, when the value does not come within `limit`.
pub fn found<T, E: Display>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<T, E>,
) -> Result<T, WaitError> {
    let mut pace = Pace::new(limit);
    loop {
        match (probe(), pace.next()) {
            (Ok(value), _) => return Ok(value),
            (Err(_), Some(pause)) => std::thread::sleep(pause),
            (Err(seen), None) => return Err(pace.expired(what, &seen)),
        }
    }
}

/// [`until`] for asynchronous conditions.
///
/// # Errors
/// As [`until`].
pub async fn until_async(
    what: &str,
    limit: Duration,
    mut condition: impl AsyncFnMut() -> bool,
) -> Result<(), WaitError> {
    found_async(what, limit, async || held(condition().await)).await
}

/// [`found`] for asynchronous probes.
///
/// # Errors
/// As [`found`].
pub async fn found_async<T, E: Display>(
    what: &str,
    limit: Duration,
    mut probe: impl AsyncFnMut() -> Result<T, E>,
) -> Result<T, WaitError> {
    let mut pace = Pace::new(limit);
    loop {
        match (probe().await, pace.next()) {
            (Ok(value), _) => return Ok(value),
            (Err(_), Some(pause)) => tokio::time::sleep(pause).await,
            (Err(seen), None) => return Err(pace.expired(what, &seen)),
        }
    }
}

fn held(condition: bool) -> Result<(), &'static str> {
    if condition { Ok(()) } else { Err("the condition does not hold") }
}

/// The pauses between two looks at a condition. It ends only after a look at the deadline or later.
struct Pace {
    start: Instant,
    limit: Duration,
    pause: Duration,
    last: bool,
}

impl Pace {
    fn new(limit: Duration) -> Self {
        Pace { start: Instant::now(), limit, pause: FIRST_PAUSE, last: false }
    }

    fn next(&mut self) -> Option<Duration> {
        if self.last {
            return None;
        }
        let left = self.limit.saturating_sub(self.start.elapsed());
        let pause = self.pause.min(left);
        self.last = pause == left;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Some(pause)
    }

    fn expired(&self, what: &str, seen: &impl Display) -> WaitError {
        WaitError { what: what.to_owned(), waited: self.start.elapsed(), seen: seen.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_returned_once_it_is_there() {
        let mut looks = 0;
        let value = found("the third look", Duration::from_secs(10), || {
            looks += 1;
            if looks == 3 { Ok(looks) } else { Err(format!("look {looks}")) }
        });
        assert_eq!(value.unwrap(), 3);
    }

    #[test]
    fn the_error_names_what_was_waited_for_and_what_was_seen() {
        let limit = Duration::from_millis(20);
        let error = found::<(), _>("a green light", limit, || Err("a red light")).unwrap_err();
        assert!(error.waited >= limit, "{error}");
        assert!(error.to_string().ends_with("for a green light; last seen: a red light"), "{error}");
    }

    #[test]
    fn a_condition_is_asked_even_when_the_deadline_has_passed() {
        assert!(until("nothing", Duration::ZERO, || true).is_ok());
    }

    #[tokio::test]
    async fn asynchronous_waiting_ends_the_same_ways() {
        let mut looks = 0;
        let second = until_async("the second look", Duration::from_secs(10), async || {
            looks += 1;
            looks == 2
        });
        second.await.unwrap();
        let never = until_async("never", Duration::from_millis(5), async || false).await.unwrap_err();
        assert_eq!(never.what, "never");
    }
}
