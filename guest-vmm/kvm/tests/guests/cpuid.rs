//! What CPUID answers a guest.

use crate::guest::*;
use processor::{CpuidMask, PartitionConfig, VpHaltReason};
use vm_memory::{Bytes, GuestAddress};

/// The leaf and the subleaf that the guest asks for, and behind them the answer.
const QUESTION: GuestAddress = GuestAddress(0x2000);
const ANSWER: GuestAddress = GuestAddress(0x2010);

/// mov eax, [0x2000]; mov ecx, [0x2004]; cpuid; mov [0x2010], eax; mov [0x2014], ebx; mov [0x2018], ecx; mov [0x201c], edx;
/// mov dx, 0x604; mov ax, 0x2000; out dx, ax; hlt; jmp to the hlt
const ASK: [u8; 49] = [
    0xa1, 0x00, 0x20, 0, 0, 0x8b, 0x0d, 0x04, 0x20, 0, 0, 0x0f, 0xa2, //
    0xa3, 0x10, 0x20, 0, 0, 0x89, 0x1d, 0x14, 0x20, 0, 0, 0x89, 0x0d, 0x18, 0x20, 0, 0, 0x89, 0x15, 0x1c,
    0x20, 0, 0, //
    0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef, 0xf4, 0xeb, 0xfd,
];

/// A guest that asks, from which this is hidden.
fn asking(cpuid_mask: &[CpuidMask]) -> Guest {
    Guest::configured(Mode::Flat, &ASK, |memory| PartitionConfig {
        cpuid_mask: cpuid_mask.to_vec(),
        ..PartitionConfig::new(1, memory)
    })
}

/// What the guest is answered: EAX, EBX, ECX, EDX.
fn seen(guest: &Guest, leaf: u32, subleaf: u32) -> [u32; 4] {
    guest.memory.write_obj([leaf, subleaf], QUESTION).unwrap();
    guest.boot();
    guest.start();
    assert!(matches!(guest.halt(), VpHaltReason::PowerOff));
    guest.memory.read_obj(ANSWER).unwrap()
}

/// What the VP's state says of the leaf.
fn in_state(guest: &Guest, leaf: u32, subleaf: u32) -> [u32; 4] {
    let cpuid = guest.access(|state| state.cpuid().unwrap());
    let is_asked =
        |l: &&processor::CpuidLeaf| l.function == leaf && l.index.is_none_or(|index| index == subleaf);
    let found = cpuid.0.iter().find(is_asked).expect("the host has it");
    [found.eax, found.ebx, found.ecx, found.edx]
}

fn one_bit_of(register: u32) -> u32 {
    assert_ne!(register, 0, "there is nothing to hide");
    1 << register.trailing_zeros()
}

const FEATURES: u32 = 1;
/// CMPXCHG16B, which every host has.
const CX16: u32 = 1 << 13;
const HYPERVISOR: u32 = 1 << 31;
const MORE_FEATURES: u32 = 0x8000_0001;
/// Whose leaf 0x40000001 has KVM's own features.
const KVM_FEATURES: u32 = 0x4000_0001;

/// With features that every KVM can hide: some hosts' insist on those of leaf 7 and most of leaf 1.
#[test]
fn a_guest_does_not_see_what_is_hidden_and_sees_all_else() {
    let open = asking(&[]);
    let [_, _, ecx, _] = seen(&open, FEATURES, 0);
    let [_, _, _, more] = seen(&open, MORE_FEATURES, 0);
    let [kvm, ..] = seen(&open, KVM_FEATURES, 0);
    assert_eq!(ecx & (HYPERVISOR | CX16), HYPERVISOR | CX16);
    let masks = [
        CpuidMask { function: FEATURES, ecx: HYPERVISOR | CX16, ..CpuidMask::default() },
        CpuidMask { function: MORE_FEATURES, index: Some(0), edx: one_bit_of(more), ..CpuidMask::default() },
        CpuidMask { function: KVM_FEATURES, eax: one_bit_of(kvm), ..CpuidMask::default() },
        CpuidMask { function: 0x7fff_0000, eax: !0, ..CpuidMask::default() },
    ];
    let left = |leaf, answer: [u32; 4]| {
        masks.iter().filter(|mask| mask.function == leaf).fold(answer, |answer, mask| {
            let hidden = [mask.eax, mask.ebx, mask.ecx, mask.edx];
            std::array::from_fn(|register| answer[register] & !hidden[register])
        })
    };
    let masked = asking(&masks);
    for leaf in [0, FEATURES, MORE_FEATURES, KVM_FEATURES] {
        assert_eq!(seen(&masked, leaf, 0), left(leaf, seen(&open, leaf, 0)), "leaf {leaf:#x}");
        let state = left(leaf, in_state(&open, leaf, 0));
        assert_eq!(in_state(&masked, leaf, 0), state, "leaf {leaf:#x} in the state");
    }
    masked.assert_no_halt();
}
