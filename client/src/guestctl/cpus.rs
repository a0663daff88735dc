//! Processors as the command line takes them: where VPs run, and what they are not to see of the host's CPU.

use guest_client::{CpuidMask, VpAffinity};
use std::collections::BTreeSet;
use std::ops::RangeInclusive;

/// Reads a set of the host's CPUs for all VPs (`0-3,6`), or one for each VP that is named (`0=0-1,1=2,3`).
pub fn affinity(text: &str) -> Result<VpAffinity, String> {
    if !text.contains('=') {
        let mut cpus = BTreeSet::new();
        text.split(',').try_for_each(|item| add(&mut cpus, item))?;
        return Ok(VpAffinity::All(cpus));
    }
    let mut sets: Vec<BTreeSet<u32>> = Vec::new();
    let mut vp = None;
    for item in text.split(',') {
        let cpus = match item.split_once('=') {
            None => item,
            Some((name, cpus)) => {
                vp = Some(begin(&mut sets, name)?);
                cpus
            }
        };
        let vp = vp.ok_or_else(|| format!("{item:?} belongs to no VP: lists for some begin with VP="))?;
        add(&mut sets[vp], cpus)?;
    }
    Ok(VpAffinity::Each(sets))
}

/// The place of the VP's set, which is empty.
fn begin(sets: &mut Vec<BTreeSet<u32>>, name: &str) -> Result<usize, String> {
    let vp: u16 = name.parse().map_err(|_| format!("{name:?} is no VP's number"))?;
    let vp = usize::from(vp);
    if sets.len() <= vp {
        sets.resize(vp + 1, BTreeSet::new());
    }
    if sets[vp].is_empty() { Ok(vp) } else { Err(format!("VP {vp} is there twice")) }
}

/// Adds one CPU, or a range of them.
fn add(cpus: &mut BTreeSet<u32>, item: &str) -> Result<(), String> {
    let cpu = |text: &str| text.parse().map_err(|_| format!("{text:?} is no CPU's number"));
    let range: RangeInclusive<u16> = match item.split_once('-') {
        None => {
            let cpu = cpu(item)?;
            cpu..=cpu
        }
        Some((first, last)) => cpu(first)?..=cpu(last)?,
    };
    if range.is_empty() {
        return Err(format!("{item:?} ends before it begins"));
    }
    cpus.extend(range.map(u32::from));
    Ok(())
}

/// Reads bits of CPUID to hide: `7.0:ebx=0x20,ecx=4`, or `1:ecx=0x2000` for all subleaves.
pub fn cpuid_mask(text: &str) -> Result<CpuidMask, String> {
    let shape = || "a mask is LEAF:REGISTER=BITS or LEAF.SUBLEAF:REGISTER=BITS,…".to_owned();
    let (place, registers) = text.split_once(':').ok_or_else(shape)?;
    let (leaf, subleaf) = match place.split_once('.') {
        None => (number(place)?, None),
        Some((leaf, subleaf)) => (number(leaf)?, Some(number(subleaf)?)),
    };
    let mut mask = CpuidMask { leaf, subleaf, ..CpuidMask::default() };
    for item in registers.split(',') {
        let (name, bits) = item.split_once('=').ok_or_else(shape)?;
        let register = match name {
            "eax" => &mut mask.eax,
            "ebx" => &mut mask.ebx,
            "ecx" => &mut mask.ecx,
            "edx" => &mut mask.edx,
            _ => return Err(format!("{name:?} is none of eax, ebx, ecx, edx")),
        };
        *register |= number(bits)?;
    }
    Ok(mask)
}

fn number(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("{text:?} is no number of 32 bits, decimal or 0x…"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_for_all_vps_or_for_each() {
        for (text, affinity) in [
            ("0", VpAffinity::All([0].into())),
            ("6,0-2,1", VpAffinity::All([0, 1, 2, 6].into())),
            ("0=0,1=1", VpAffinity::Each(vec![[0].into(), [1].into()])),
            ("0=0-1,4,2=3", VpAffinity::Each(vec![[0, 1, 4].into(), BTreeSet::new(), [3].into()])),
            ("1=2", VpAffinity::Each(vec![BTreeSet::new(), [2].into()])),
        ] {
            assert_eq!(super::affinity(text), Ok(affinity), "{text}");
        }
    }

    #[test]
    fn what_is_no_list_says_why() {
        for (text, reason) in [
            ("", "\"\" is no CPU's number"),
            ("0,", "\"\" is no CPU's number"),
            ("a", "\"a\" is no CPU's number"),
            ("-1", "\"\" is no CPU's number"),
            ("0-4294967295", "\"4294967295\" is no CPU's number"),
            ("3-1", "\"3-1\" ends before it begins"),
            ("0=", "\"\" is no CPU's number"),
            ("x=0", "\"x\" is no VP's number"),
            ("0,1=1", "\"0\" belongs to no VP"),
            ("0=0,0=1", "VP 0 is there twice"),
        ] {
            let error = affinity(text).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn masks_name_a_leaf_and_bits_of_registers() {
        let mask = CpuidMask { leaf: 7, subleaf: Some(0), ebx: 0x20, ecx: 5, ..CpuidMask::default() };
        assert_eq!(cpuid_mask("7.0:ebx=0x20,ecx=4,ecx=1"), Ok(mask));
        let mask = CpuidMask { leaf: 0x8000_0001, edx: u32::MAX, ..CpuidMask::default() };
        assert_eq!(cpuid_mask("0x80000001:edx=0xffffffff"), Ok(mask));
    }

    #[test]
    fn what_is_no_mask_says_why() {
        for (text, reason) in [
            ("", "LEAF:REGISTER=BITS"),
            ("7", "LEAF:REGISTER=BITS"),
            ("7:ebx", "LEAF:REGISTER=BITS"),
            ("7.x:ebx=1", "\"x\" is no number"),
            ("7:rbx=1", "\"rbx\" is none of eax"),
            ("7:ebx=0x100000000", "\"0x100000000\" is no number of 32 bits"),
            ("seven:ebx=1", "\"seven\" is no number"),
        ] {
            let error = cpuid_mask(text).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
