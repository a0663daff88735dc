//! Durations as the command line takes them.

use std::time::Duration;

/// Reads a duration: a whole number, and ms, s, min or h.
pub fn parse(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err("a duration is a whole number and a unit, for instance 30s, 500ms or 2min".into());
    }
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1000,
        "min" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        _ => return Err(format!("unknown unit {unit:?}: use ms, s, min or h")),
    };
    let too_long = || "longer than 64 bits of milliseconds".to_owned();
    let number: u64 = number.parse().map_err(|_| too_long())?;
    number.checked_mul(milliseconds).map(Duration::from_millis).ok_or_else(too_long)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_read() {
        for (text, milliseconds) in
            [("0s", 0), ("1500ms", 1500), ("30s", 30_000), ("2min", 120_000), ("1h", 3_600_000)]
        {
            assert_eq!(parse(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
    }

    #[test]
    fn what_is_no_duration_says_why() {
        for (text, reason) in [
            ("", "whole number"),
            ("s", "whole number"),
            ("-1s", "whole number"),
            ("30", "unknown unit \"\""),
            ("1.5s", "unknown unit \".5s\""),
            ("5m", "unknown unit \"m\""),
            ("99999999999999999999s", "64 bits"),
            ("9999999999999999999h", "64 bits"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
