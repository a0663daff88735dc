//! `--mem`: memory that can be plugged while the guest runs.

use crate::pairs::Pairs;
use guest_client::MemDeviceConfig;

const KEYS: [&str; 4] = ["region", "block", "align", "size"];

/// Reads one `--mem`.
pub fn parse(text: &str) -> Result<MemDeviceConfig, String> {
    let pairs = Pairs::read(text, &KEYS)?;
    let region_bytes = pairs.size("region")?.ok_or("region=SIZE is missing")?;
    let mut config = MemDeviceConfig::of_region(region_bytes);
    config.block_bytes = pairs.size("block")?.unwrap_or(config.block_bytes);
    config.region_alignment_bytes = pairs.size("align")?.unwrap_or(config.region_alignment_bytes);
    config.requested_bytes = pairs.size("size")?.unwrap_or(config.requested_bytes);
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::parse;
    use guest_client::MemDeviceConfig;

    #[test]
    fn a_region_is_all_that_is_needed() {
        let parsed = parse("region=4G").expect("valid");
        assert_eq!(parsed, MemDeviceConfig::of_region(4 << 30));
        let all = parse("region=4G,block=4M,align=1G,size=512M").expect("valid");
        let expected = MemDeviceConfig {
            block_bytes: 4 << 20,
            region_bytes: 4 << 30,
            region_alignment_bytes: 1 << 30,
            requested_bytes: 512 << 20,
        };
        assert_eq!(all, expected);
        assert_eq!(parse("size=1G").expect_err("no region"), "region=SIZE is missing");
    }
}
