//! Values out of the text that a client gives: what a node shows of itself can be written back as it is.

use crate::{Hex, Value};
use std::time::Duration;

/// A type whose values can be written as text: what a writable node holds.
///
/// The text that its [`Value`] is shown as stands for the same value.
pub trait FromText: Into<Value> {
    /// The value that `text` stands for, if it does for one. Surrounding white space counts.
    fn from_text(text: &str) -> Option<Self>;

    /// What such text is, to go on after "is not": "a whole number from 0 to 255".
    fn expected() -> String;
}

impl FromText for bool {
    fn from_text(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    fn expected() -> String {
        "true or false".to_owned()
    }
}

/// Any text.
impl FromText for String {
    fn from_text(text: &str) -> Option<Self> {
        Some(text.to_owned())
    }

    fn expected() -> String {
        "text".to_owned()
    }
}

macro_rules! from_integer_text {
    ($($integer:ty)*) => {$(
        impl FromText for $integer {
            fn from_text(text: &str) -> Option<Self> {
                text.parse().ok()
            }

            fn expected() -> String {
                format!("a whole number from {} to {}", Self::MIN, Self::MAX)
            }
        }
    )*};
}

from_integer_text! { u8 u16 u32 u64 usize i8 i16 i32 i64 }

/// In hexadecimal after `0x`, else decimal.
impl<T: TryFrom<u64> + Into<u64>> FromText for Hex<T> {
    fn from_text(text: &str) -> Option<Self> {
        let number = match text.strip_prefix("0x") {
            // from_str_radix would take a sign.
            Some(digits) if digits.starts_with('+') => return None,
            Some(digits) => u64::from_str_radix(digits, 16).ok()?,
            None => text.parse().ok()?,
        };
        T::try_from(number).ok().map(Hex)
    }

    fn expected() -> String {
        format!("a number of at most {} bytes, such as 0x1f or 31", size_of::<T>())
    }
}

/// A decimal number with one of the units `ns`, `us`, `µs`, `ms`, `s`, `min`, `h`; without one, of seconds, as in JSON.
impl FromText for Duration {
    fn from_text(text: &str) -> Option<Self> {
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit_nanos = match unit {
            "ns" => 1,
            "us" | "µs" => 1_000,
            "ms" => 1_000_000,
            "s" | "" => NANOS,
            "min" => 60 * NANOS,
            "h" => 3600 * NANOS,
            _ => return None,
        };
        let nanos = decimal(number, unit_nanos)?;
        let rest = u32::try_from(nanos % NANOS).ok()?;
        Some(Self::new(u64::try_from(nanos / NANOS).ok()?, rest))
    }

    fn expected() -> String {
        "a duration, such as 10s, 1.5s, 250ms or 2min".to_owned()
    }
}

const NANOS: u128 = 1_000_000_000;

/// A decimal number times `unit`; none if that is no whole number.
fn decimal(number: &str, unit: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let places = u32::try_from(fraction.len()).ok()?;
    let whole = digits(whole)?.checked_mul(unit)?;
    let (part, scale) = (digits(fraction)?.checked_mul(unit)?, 10_u128.checked_pow(places)?);
    (part % scale == 0).then(|| whole.checked_add(part / scale)).flatten()
}

fn digits(text: &str) -> Option<u128> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}
