//! What a VP is told of itself by CPUID: what the host's KVM offers, less what the guest is not to see, with the VP's own place in
//! the machine put in.
//!
//! A guest that was told of a feature elsewhere goes on only where its VPs have it.
//!
//! The topology is one socket of cores with one thread each; the local APIC ID is the VP's number. Intel SDM volume 2,
//! CPUID; AMD APM volume 3, appendix E.

use crate::error::KvmError;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use processor::{Cpuid, CpuidLeaf, CpuidMask, VpIndex};

/// A VP's place in the machine.
#[derive(Debug, Clone, Copy)]
struct Place {
    id: u32,
    count: u32,
}

impl Place {
    /// How many bits of the APIC ID number the cores.
    fn bits(self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }

    /// The number of APIC IDs that the package has room for, at most `limit`.
    fn ids(self, limit: u32) -> u32 {
        self.count.next_power_of_two().min(limit)
    }
}

/// The leaves of which every bit of these registers is a feature or something else that software relies on once it has seen it, by
/// the bits to look at: EAX, EBX, ECX, EDX. What follows control registers (OSXSAVE, OSPKE) is not looked at.
const FEATURES: [(u32, Option<u32>, [u32; 4]); 12] = [
    (1, None, [0, 0, !(1 << 27), !0]),
    (7, Some(0), [0, !0, !(1 << 4), !0]),
    (7, Some(1), [!0; 4]),
    (7, Some(2), [0, 0, 0, !0]),
    (0xd, Some(0), [!0, 0, 0, !0]),
    (0xd, Some(1), [!0, 0, !0, !0]),
    (0x8000_0001, None, [0, 0, !0, !0]),
    (0x8000_0007, None, [0, 0, 0, !0]),
    (0x8000_0008, None, [0, !0, 0, 0]),
    (0x8000_000a, None, [0, 0, 0, !0]),
    (0x8000_0021, None, [!0, 0, 0, 0]),
    // What KVM has for its guests.
    (0x4000_0001, None, [!0, 0, 0, 0]),
];
const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

/// The first feature that a guest was told of and that a VP with these leaves lacks.
pub(crate) fn lacking(own: &[kvm_cpuid_entry2], wanted: &Cpuid) -> Option<KvmError> {
    let of_own = |function, index: Option<u32>| {
        own.iter().find(|leaf| leaf.function == function && index.is_none_or(|index| leaf.index == index))
    };
    let lacks = |wanted: &CpuidLeaf| {
        let &CpuidLeaf { function, index, eax, ebx, ecx, edx } = wanted;
        let same = |known: Option<u32>| known.is_none_or(|known| known == index.unwrap_or(0));
        let known = FEATURES.iter().find(|(leaf, subleaf, _)| *leaf == function && same(*subleaf));
        let &(_, subleaf, looked_at) = known?;
        let own = of_own(function, subleaf).map_or([0; 4], |leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
        let bits: [u32; 4] = std::array::from_fn(|at| [eax, ebx, ecx, edx][at] & looked_at[at] & !own[at]);
        let at = bits.iter().position(|bits| *bits != 0)?;
        Some(KvmError::NoFeature { function, index, register: REGISTERS[at], bits: bits[at] })
    };
    wanted.0.iter().find_map(lacks)
}

/// The leaves for all VPs of a guest, but for their places. `host` is what KVM_GET_SUPPORTED_CPUID says, which is silent on the TSC
/// deadline.
pub(crate) fn for_guest(
    host: &[kvm_cpuid_entry2],
    tsc_deadline: bool,
    masks: &[CpuidMask],
) -> Vec<kvm_cpuid_entry2> {
    let mut leaves = host.to_vec();
    for leaf in &mut leaves {
        if leaf.function == 1 {
            add_features(leaf, tsc_deadline);
        }
        masks.iter().for_each(|mask| hide(leaf, mask));
    }
    leaves
}

fn add_features(leaf: &mut kvm_cpuid_entry2, tsc_deadline: bool) {
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    leaf.ecx = leaf.ecx & !TSC_DEADLINE | HYPERVISOR | if tsc_deadline { TSC_DEADLINE } else { 0 };
}

fn hide(leaf: &mut kvm_cpuid_entry2, mask: &CpuidMask) {
    if mask.covers(leaf.function, leaf.index) {
        leaf.eax &= !mask.eax;
        leaf.ebx &= !mask.ebx;
        leaf.ecx &= !mask.ecx;
        leaf.edx &= !mask.edx;
    }
}

/// The leaves for one VP of `count`, of those for the guest. Its place is put in last, so that no mask hides it.
pub(crate) fn for_vp(guest: &[kvm_cpuid_entry2], vp: VpIndex, count: u32) -> CpuId {
    let place = Place { id: vp.0, count };
    let is_topology = |leaf: &kvm_cpuid_entry2| matches!(leaf.function, 0xb | 0x1f);
    let mut leaves: Vec<_> = guest.iter().filter(|leaf| !is_topology(leaf)).copied().collect();
    for leaf in &mut leaves {
        patch(leaf, place);
    }
    for function in [0xb, 0x1f] {
        if guest.iter().any(|leaf| leaf.function == function) {
            leaves.extend(topology(function, place));
        }
    }
    leaves.truncate(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
    CpuId::from_entries(&leaves).expect("truncated to what fits")
}

fn patch(leaf: &mut kvm_cpuid_entry2, place: Place) {
    match leaf.function {
        0x1 => patch_counts(leaf, place),
        0x4 => patch_cache(leaf, place, (place.ids(64) - 1) << 26),
        0x8000_0008 => {
            // ApicIdSize, and the number of cores less one.
            leaf.ecx = leaf.ecx & !0xf0ff | place.bits() << 12 | (place.count - 1);
        }
        0x8000_001d => patch_cache(leaf, place, 0),
        0x8000_001e => {
            // The APIC ID; the core's number, with one thread a core; node 0 of one.
            (leaf.eax, leaf.ebx, leaf.ecx) = (place.id, place.id & 0xff, 0);
        }
        _ => {}
    }
}

fn patch_counts(leaf: &mut kvm_cpuid_entry2, place: Place) {
    const HTT: u32 = 1 << 28;
    leaf.ebx = leaf.ebx & 0xffff | place.ids(255) << 16 | place.id << 24;
    leaf.edx = leaf.edx & !HTT | if place.count > 1 { HTT } else { 0 };
}

/// A cache: levels 1 and 2 belong to one core, the others to all. `cores` is what else belongs into EAX.
fn patch_cache(leaf: &mut kvm_cpuid_entry2, place: Place, cores: u32) {
    let (kind, level) = (leaf.eax & 0x1f, leaf.eax >> 5 & 7);
    if kind != 0 {
        let sharing = if level >= 3 { place.ids(4096) - 1 } else { 0 };
        leaf.eax = leaf.eax & 0x3fff | sharing << 14 | cores;
    }
}

/// The levels of leaves 0xb and 0x1f: threads, cores, and the end.
fn topology(function: u32, place: Place) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    let level = |index, eax, ebx, ecx| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: ecx | index,
        edx: place.id,
        ..Default::default()
    };
    [level(0, 0, 1, THREADS), level(1, place.bits(), place.count, CORES), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn vp(host: &[kvm_cpuid_entry2], n: u32, count: u32) -> impl Fn(u32, u32) -> [u32; 4] {
        masked(host, n, count, &[])
    }

    fn masked(
        host: &[kvm_cpuid_entry2],
        n: u32,
        count: u32,
        masks: &[CpuidMask],
    ) -> impl Fn(u32, u32) -> [u32; 4] {
        let leaves = for_vp(&for_guest(host, true, masks), VpIndex(n), count);
        move |function, index| {
            let found = leaves.as_slice().iter().find(|l| l.function == function && l.index == index);
            found.map(|l| [l.eax, l.ebx, l.ecx, l.edx]).unwrap()
        }
    }

    #[test]
    fn a_vp_lacks_what_it_was_told_of_and_has_not() {
        let own = [leaf(1, 0, [1, 2, 0x10, 0x20]), leaf(7, 0, [0, 0x28, 0, 0]), leaf(0xd, 1, [7, 9, 0, 0])];
        let told = |function, index, registers: [u32; 4]| {
            let [eax, ebx, ecx, edx] = registers;
            let wanted = Cpuid(vec![CpuidLeaf { function, index, eax, ebx, ecx, edx }]);
            lacking(&own, &wanted).map(|error| error.to_string())
        };
        // Less, another APIC ID, and what follows CR4.
        assert_eq!(told(1, None, [9, 99, 0x10 | 1 << 27, 0]), None);
        assert_eq!(told(7, Some(0), [0, 0x28, 1 << 4, 0]), None);
        assert_eq!(told(0xd, Some(1), [7, 99, 0, 0]), None);
        assert_eq!(told(0xd, Some(5), [!0; 4]), None, "where a state component lies");
        let text = |what| Some(format!("this host has no CPUID {what}, which its guest was told of"));
        assert_eq!(told(1, None, [0, 0, 0x13, 0]), text("0x1 ECX bits 0x3"));
        assert_eq!(told(7, Some(0), [0, 0x30, 0, 1]), text("0x7.0x0 EBX bits 0x10"));
        assert_eq!(told(7, Some(1), [8, 0, 0, 0]), text("0x7.0x1 EAX bits 0x8"));
        assert_eq!(told(0x8000_0001, None, [0, 0, 0, 4]), text("0x80000001 EDX bits 0x4"));
    }

    #[test]
    fn a_vp_knows_its_place() {
        let host = [
            leaf(0x1, 0, [0xa2_0f10, 0x0102_0800, 0, 0]),
            leaf(0x4, 0, [0xfc00_0121, 1, 2, 3]),
            leaf(0x4, 3, [0xfc03_c163, 1, 2, 3]),
            leaf(0x4, 4, [0; 4]),
            leaf(0xb, 0, [1, 2, 3, 77]),
            leaf(0x1f, 0, [1, 2, 3, 77]),
            leaf(0x4000_0000, 0, [0x4000_0001, 1, 2, 3]),
            leaf(0x8000_0008, 0, [0x3030, 0, 0x7001, 0]),
            leaf(0x8000_001e, 0, [9, 0x109, 0x300, 0]),
        ];
        let seen = vp(&host, 2, 6);
        assert_eq!(seen(1, 0), [0xa2_0f10, 0x0208_0800, 1 << 31 | 1 << 24, 1 << 28]);
        assert_eq!(seen(4, 0), [0x1c00_0121, 1, 2, 3], "the first level has one core");
        assert_eq!(seen(4, 3), [0x1c01_c163, 1, 2, 3], "the third has all");
        assert_eq!(seen(4, 4), [0; 4]);
        for function in [0xb, 0x1f] {
            assert_eq!(seen(function, 0), [0, 1, 0x100, 2]);
            assert_eq!(seen(function, 1), [3, 6, 0x201, 2]);
            assert_eq!(seen(function, 2), [0, 0, 2, 2]);
        }
        assert_eq!(seen(0x4000_0000, 0), [0x4000_0001, 1, 2, 3], "as the host has it");
        assert_eq!(seen(0x8000_0008, 0), [0x3030, 0, 0x3005, 0]);
        assert_eq!(seen(0x8000_001e, 0), [2, 2, 0, 0]);
    }

    #[test]
    fn a_single_vp_and_the_last_of_many_fit() {
        let host = [leaf(0x1, 0, [0, 0, 0, 1 << 28]), leaf(0x4, 0, [0x163, 0, 0, 0])];
        let seen = vp(&host, 0, 1);
        assert_eq!(seen(1, 0), [0, 1 << 16, 1 << 31 | 1 << 24, 0]);
        assert_eq!(seen(4, 0), [0x163, 0, 0, 0]);
        let seen = vp(&host, 253, 254);
        assert_eq!(seen(1, 0)[1], 253 << 24 | 255 << 16);
        assert_eq!(seen(4, 0)[0], 63 << 26 | 255 << 14 | 0x163);
    }

    #[test]
    fn a_mask_takes_away_and_no_more() {
        let all = [u32::MAX; 4];
        let host = [leaf(0x1, 0, all), leaf(0x7, 0, all), leaf(0x7, 1, all), leaf(0xd, 1, all)];
        let masks = [
            CpuidMask { function: 0x7, index: Some(0), ebx: 1 << 5, ..CpuidMask::default() },
            CpuidMask { function: 0x7, index: None, ecx: 1 << 16, ..CpuidMask::default() },
            CpuidMask { function: 0xd, index: Some(0), eax: 1, ..CpuidMask::default() },
            CpuidMask { function: 0x9999, eax: 1, ..CpuidMask::default() },
            CpuidMask { function: 0x1, index: Some(0), ecx: 1 << 24 | 1 << 31, ..CpuidMask::default() },
        ];
        let seen = masked(&host, 0, 2, &masks);
        assert_eq!(seen(0x7, 0), [!0, !(1 << 5), !(1 << 16), !0], "both masks");
        assert_eq!(seen(0x7, 1), [!0, !0, !(1 << 16), !0], "the one for every subleaf");
        assert_eq!(seen(0xd, 1), all, "another subleaf");
        assert_eq!(seen(0x1, 0)[2], !(1 << 24 | 1 << 31), "what is put in besides");
        let zeros = [leaf(0x7, 0, [0; 4])];
        assert_eq!(masked(&zeros, 0, 1, &masks)(0x7, 0), [0; 4], "nothing is set");
    }

    #[test]
    fn a_place_cannot_be_hidden() {
        let host = [
            leaf(0x1, 0, [!0; 4]),
            leaf(0xb, 0, [!0; 4]),
            leaf(0x8000_0008, 0, [!0; 4]),
            leaf(0x8000_001e, 0, [!0; 4]),
        ];
        let everything = |function| CpuidMask { function, index: None, eax: !0, ebx: !0, ecx: !0, edx: !0 };
        let masks = [0x1, 0xb, 0x8000_0008, 0x8000_001e].map(everything);
        let seen = masked(&host, 2, 6, &masks);
        assert_eq!(seen(0x1, 0), [0, 2 << 24 | 8 << 16, 0, 1 << 28]);
        assert_eq!(seen(0xb, 1), [3, 6, 0x201, 2]);
        assert_eq!(seen(0x8000_0008, 0), [0, 0, 0x3005, 0]);
        assert_eq!(seen(0x8000_001e, 0), [2, 2, 0, 0]);
    }
}
