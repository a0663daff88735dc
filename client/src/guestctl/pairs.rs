//! Options of several parts: `KEY=VALUE[,KEY=VALUE]…`. A comma ends a value.

use crate::size;
use guest_client::RateLimits;
use std::str::FromStr;

/// The keys of rate limits: bytes and operations a second, and their bursts.
pub const LIMITS: [&str; 4] = ["bps", "bps-burst", "iops", "iops-burst"];

/// The parts of an option, each key known and there once.
#[derive(Debug, Clone)]
pub struct Pairs<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Pairs<'a> {
    /// Reads an option whose keys are among these.
    pub fn read(text: &'a str, keys: &[&str]) -> Result<Self, String> {
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for item in text.split(',').filter(|_| !text.is_empty()) {
            let (key, value) = item
                .split_once('=')
                .ok_or_else(|| format!("{item:?} is no KEY=VALUE: the keys are {}", keys.join(", ")))?;
            if !keys.contains(&key) {
                return Err(format!("{key:?} is none of {}", keys.join(", ")));
            }
            if pairs.iter().any(|(other, _)| *other == key) {
                return Err(format!("{key} is there twice"));
            }
            pairs.push((key, value));
        }
        Ok(Self(pairs))
    }

    /// A value as it stands.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.0.iter().find(|(other, _)| *other == key).map(|(_, value)| *value)
    }

    /// A number of bytes, with a unit or without.
    pub fn size(&self, key: &str) -> Result<Option<u64>, String> {
        self.text(key).map(size::parse).transpose().map_err(|problem| format!("{key}: {problem}"))
    }

    /// A number.
    pub fn number<T: FromStr>(&self, key: &str) -> Result<Option<T>, String> {
        let parse =
            |value: &str| value.parse().map_err(|_| format!("{key}: {value:?} is no number that can be"));
        self.text(key).map(parse).transpose()
    }

    /// Rate limits; none of what is not there.
    pub fn limits(&self) -> Result<RateLimits, String> {
        let [bps, bps_burst, iops, iops_burst] = LIMITS;
        Ok(RateLimits {
            bytes_per_second: self.size(bps)?.unwrap_or(0),
            bytes_burst: self.size(bps_burst)?.unwrap_or(0),
            operations_per_second: self.number(iops)?.unwrap_or(0),
            operations_burst: self.number(iops_burst)?.unwrap_or(0),
        })
    }

    /// `on` or `off`; off if it is not there.
    pub fn switch(&self, key: &str) -> Result<bool, String> {
        match self.text(key) {
            Some("on") => Ok(true),
            Some("off") | None => Ok(false),
            Some(value) => Err(format!("{key}: {value:?} is neither on nor off")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pairs;

    const KEYS: [&str; 3] = ["size", "count", "readonly"];

    #[test]
    fn values_are_read_by_their_kind() {
        let pairs = Pairs::read("size=1M,count=7,readonly=on", &KEYS).expect("valid");
        assert_eq!((pairs.size("size"), pairs.number("count")), (Ok(Some(1 << 20)), Ok(Some(7u8))));
        assert_eq!((pairs.switch("readonly"), pairs.text("count")), (Ok(true), Some("7")));
        let none = Pairs::read("", &KEYS).expect("nothing is valid");
        assert_eq!(
            (none.size("size"), none.number::<u8>("count"), none.switch("readonly")),
            (Ok(None), Ok(None), Ok(false))
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, problem) in [
            ("size", "\"size\" is no KEY=VALUE: the keys are size, count, readonly"),
            ("sice=1", "\"sice\" is none of size, count, readonly"),
            ("count=1,count=2", "count is there twice"),
            ("count=1,", "\"\" is no KEY=VALUE: the keys are size, count, readonly"),
        ] {
            assert_eq!(Pairs::read(text, &KEYS).expect_err(text), problem);
        }
        let pairs = Pairs::read("size=1X,count=300,readonly=yes", &KEYS).expect("the keys are known");
        assert!(pairs.size("size").expect_err("no unit").starts_with("size: unknown unit"));
        assert_eq!(pairs.number::<u8>("count"), Err("count: \"300\" is no number that can be".into()));
        assert_eq!(pairs.switch("readonly"), Err("readonly: \"yes\" is neither on nor off".into()));
    }
}
