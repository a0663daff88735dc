//! Moments, as people read them.

/// A moment in µs since 1970, in UTC, to the second.
pub(super) fn utc(us: u64) -> String {
    let seconds = us / 1_000_000;
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// Year, month and day of a day since 1970 in the Gregorian calendar: counted from 1 March, so that the leap day is a year's last.
fn civil(day: u64) -> (u64, u64, u64) {
    /// Days from 1 March of year 0 to 1970.
    const TO_1970: u64 = 719_468;
    let day = day + TO_1970;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + carry, month, date)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
            (1_795_303_659, "2026-11-21 23:27:39 UTC"),
        ] {
            assert_eq!(utc(seconds * 1_000_000 + 7), text);
        }
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let mut before = civil(0);
        for day in 1..200_000 {
            let (year, month, date) = civil(day);
            let next = match before {
                (y, 12, 31) => (y + 1, 1, 1),
                (y, m, d) if date == 1 => (y, m + 1, if d >= 28 { 1 } else { 0 }),
                (y, m, d) => (y, m, d + 1),
            };
            assert_eq!((year, month, date), next);
            before = next;
        }
    }
}
