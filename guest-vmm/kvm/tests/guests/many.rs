//! Many VPs, started by INIT and SIPI.

use crate::guest::{Guest, Mode, hypervisor};
use futures::executor::block_on;
use processor::{Hypervisor, MpState};
use std::collections::BTreeSet;
use vm_memory::{Bytes, GuestAddress};

const VPS: u32 = 63;

/// Where a VP that is started by SIPI vector 8 runs.
const SECOND: u64 = 0x8000;

/// Takes the next number from 0x2000 and prints it: mov al, 1; lock xadd [0x2000], al; mov dx, 0x3f8; out dx, al; cli; hlt;
/// jmp to the hlt
const OTHERS: [u8; 15] =
    [0xb0, 0x01, 0xf0, 0x0f, 0xc0, 0x06, 0x00, 0x20, 0xba, 0xf8, 0x03, 0xee, 0xfa, 0xf4, 0xeb];

/// mov eax, 0x1ff; mov [svr], eax; mov eax, INIT to all others; mov [icr], eax; wait; SIPI 8 to all others; cli; hlt; jmp
const FIRST: [u8; 42] = [
    0xb8, 0xff, 0x01, 0, 0, 0xa3, 0xf0, 0, 0xe0, 0xfe, 0xb8, 0, 0x45, 0x0c, 0, 0xa3, 0, 0x03, 0xe0,
    0xfe, //
    0xb9, 0, 0x10, 0, 0, 0x49, 0x75, 0xfd, 0xb8, 0x08, 0x46, 0x0c, 0, 0xa3, 0, 0x03, 0xe0, 0xfe, //
    0xfa, 0xf4, 0xeb, 0xfd,
];

fn states(guest: &Guest) -> Vec<MpState> {
    let state = |vp: &processor::VpThread| block_on(vp.access(|state| state.mp_state().unwrap())).unwrap();
    guest.vps.iter().map(state).collect()
}

#[test]
fn all_start_and_after_a_reset_again() {
    let guest = Guest::with(Mode::Flat, &FIRST, VPS);
    guest.memory.write_slice(&OTHERS, GuestAddress(SECOND)).unwrap();
    guest.memory.write_slice(&[0xfd], GuestAddress(SECOND + OTHERS.len() as u64)).unwrap();
    let others = VPS as usize - 1;
    for _ in 0..3 {
        guest.memory.write_slice(&[0], GuestAddress(0x2000)).unwrap();
        assert!(states(&guest)[1..].iter().all(|state| *state == MpState::WaitForSipi));
        guest.start();
        let printed: BTreeSet<_> = guest.bus.expect_bytes(others).into_iter().collect();
        assert_eq!(printed.len(), others, "each VP has a number of its own");
        guest.stop();
        assert!(states(&guest)[1..].iter().all(|state| *state != MpState::WaitForSipi));
        guest.reset();
    }
    guest.assert_no_halt();
}

#[test]
fn more_than_the_host_has_are_refused() {
    let limit = hypervisor().max_vps().unwrap();
    assert!((1..=254).contains(&limit));
    let memory = vm_memory::GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    let config = processor::PartitionConfig::new(limit + 1, memory);
    let error = hypervisor().build(&config).err().unwrap();
    assert_eq!(error.to_string(), format!("{} VPs asked for, the host allows {limit}", limit + 1));
}
