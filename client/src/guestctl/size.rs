//! Sizes as the command line takes them.

/// Reads a number of bytes: a whole number, then nothing, or a unit of 1024 (K, M, G, T; `KiB` and `KB` mean the same).
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err("a size is a whole number and a unit, for instance 256M, 1G, or bytes".into());
    }
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("unknown unit {unit:?}: use K, M, G or T, or none for bytes")),
    };
    let too_large = || "more bytes than 64 bits can count".to_owned();
    let number: u64 = number.parse().map_err(|_| too_large())?;
    number.checked_mul(1 << shift).ok_or_else(too_large)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn units_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096b", 4096),
            ("1k", 1 << 10),
            ("256M", 256 << 20),
            ("256MiB", 256 << 20),
            ("1GB", 1 << 30),
            ("2t", 2 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_says_why() {
        for (text, reason) in [
            ("", "whole number"),
            ("M", "whole number"),
            ("-1M", "whole number"),
            ("1.5G", "unknown unit \".5G\""),
            ("1 G", "unknown unit"),
            ("12X", "unknown unit \"X\""),
            ("99999999999999999999", "64 bits"),
            ("99999999T", "64 bits"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
