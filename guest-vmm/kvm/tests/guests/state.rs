//! All of a VP's and a partition's state: saved, restored elsewhere, compared, scrubbed.

use crate::guest::*;
use futures::executor::block_on;
use processor::VpIndex;
use processor::{
    Clock, Cpuid, IrqRoutes, MpState, MsiRequest, NumberedRegisters, PartitionConfig, PartitionState,
    StateAccessError, TimePolicy, VpState, VpStateKind, Vtl,
};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

/// `inc eax; movd xmm0, eax` would not do on every host: counts in eax, for ever.
const COUNT: [u8; 3] = [0x40, 0xeb, 0xfd];

fn save(guest: &Guest) -> VpState {
    guest.access(|state| VpState::save(state).unwrap())
}

fn restore(guest: &Guest, state: &VpState) -> Result<(), StateAccessError<VpStateKind>> {
    let state = state.clone();
    guest.access(move |to| state.restore(to))
}

const VP: VpIndex = VpIndex(0);

/// A guest that has counted for a while, stopped.
fn counted() -> Guest {
    let guest = Guest::new(Mode::Flat, &COUNT);
    guest.start();
    while guest.access(|state| state.registers().unwrap().rax) < 1000 {}
    guest.stop();
    guest
}

#[test]
fn a_vp_goes_on_elsewhere_from_where_it_was() {
    let guest = counted();
    guest.partition.stop_time().unwrap();
    let state = save(&guest);
    assert_eq!(save(&guest).differences(&state), [], "a stopped VP does not change");
    let kinds: Vec<_> = state.kinds().filter(|kind| *kind != VpStateKind::Tsc).collect();
    let all = VpStateKind::ALL.iter().copied().filter(|kind| *kind != VpStateKind::Tsc);
    assert_eq!(kinds, all.collect::<Vec<_>>());

    let other = Guest::new(Mode::Real, &COUNT);
    assert!(save(&other).differences(&state).contains(&VpStateKind::Registers));
    other.partition.stop_time().unwrap();
    restore(&other, &state).unwrap();
    assert_eq!(save(&other).differences(&state), []);
    other.partition.start_time().unwrap();
    let counted = state.registers.unwrap().rax;
    other.start();
    while other.access(|state| state.registers().unwrap().rax) == counted {}
    other.stop();
    assert!(other.access(|state| state.registers().unwrap().rax) > counted);
}

#[test]
fn what_is_set_in_each_state_is_there_afterwards() {
    let guest = Guest::new(Mode::Flat, &COUNT);
    let mut state = save(&guest);
    let events = state.events.as_mut().unwrap();
    (events.nmi_masked, events.shadow_of_sti) = (true, true);
    state.debug_registers.as_mut().unwrap().breakpoints = [1, 2, 3, 4];
    state.mp_state = Some(MpState::Halted);
    // XMM0, and in the header that there is something in the SSE state (Intel SDM volume 1, section 13.4).
    let xsave = &mut state.xsave.as_mut().unwrap().0;
    xsave[160..176].fill(0x5a);
    xsave[512] |= 2;
    // KERNEL_GS_BASE.
    set(state.msrs.as_mut().unwrap(), 0xc000_0102, 0x1234_5000);
    // The task priority.
    state.local_apic.as_mut().unwrap().registers[0x80] = 0x20;
    restore(&guest, &state).unwrap();
    assert_eq!(save(&guest).differences(&state), []);
}

fn set(registers: &mut NumberedRegisters, number: u32, value: u64) {
    registers.0.iter_mut().find(|(n, _)| *n == number).expect("the host has it").1 = value;
}

#[test]
fn a_state_that_the_host_does_not_take_is_refused_by_name() {
    let guest = Guest::new(Mode::Flat, &COUNT);
    let good = save(&guest);
    let refused = |change: &dyn Fn(&mut VpState)| {
        let mut bad = good.clone();
        change(&mut bad);
        match restore(&guest, &bad) {
            Err(StateAccessError::Set { kind, source }) => (kind, source.to_string()),
            other => panic!("{other:?}"),
        }
    };
    let (kind, why) = refused(&|bad| bad.msrs.as_mut().unwrap().0.push((0x4000_0fff, 7)));
    assert_eq!(
        (kind, why.as_str()),
        (VpStateKind::Msrs, "this host has no MSR 0x40000fff, whose value was 0x7")
    );
    let (kind, why) = refused(&|bad| bad.xsave.as_mut().unwrap().0.resize(1 << 16, 1));
    let text = "the hypervisor does not support an extended state of 65536 bytes";
    assert_eq!((kind, why.as_str()), (VpStateKind::Xsave, text));
    let (kind, why) = refused(&|bad| bad.xcrs = Some(NumberedRegisters(vec![(0, 1); 17])));
    assert_eq!((kind, why.contains("17 extended control registers")), (VpStateKind::Xcrs, true), "{why}");
    let (kind, why) = refused(&|bad| bad.cpuid = Some(Cpuid(vec![Default::default(); 1 << 16])));
    assert_eq!((kind, why.contains("65536 answers")), (VpStateKind::Cpuid, true), "{why}");
    let (kind, _) = refused(&|bad| bad.system_registers.as_mut().unwrap().cr4 = u64::MAX);
    assert_eq!(kind, VpStateKind::SystemRegisters);
    restore(&guest, &good).unwrap();
}

#[test]
fn a_partition_takes_its_clock_and_routes_back() {
    let guest = counted();
    let level = MsiRequest { address: 0xfee0_0000, data: 0x8030 };
    guest.partition.set_irq_route(9, Some(level)).unwrap();
    guest.partition.set_irq_route(4, Some(MsiRequest { data: 0x0031, ..level })).unwrap();
    guest.partition.stop_time().unwrap();
    let state = PartitionState::save(&mut *guest.partition.access_state()).unwrap();
    assert_eq!(state.irq_routes.unwrap().0[9], Some(level));
    let clock = state.clock.unwrap();
    assert_eq!(
        PartitionState::save(&mut *guest.partition.access_state()).unwrap(),
        state,
        "time stands still"
    );

    let other = Guest::new(Mode::Flat, &COUNT);
    state.restore(&mut *other.partition.access_state()).unwrap();
    assert_eq!(PartitionState::save(&mut *other.partition.access_state()).unwrap(), state);
    other.partition.start_time().unwrap();
    let now = other.partition.access_state().clock().unwrap();
    assert!(now.elapsed >= clock.elapsed, "{now:?} after {clock:?}");
}

#[test]
fn a_reset_begins_time_anew_and_a_scrub_does_not() {
    let guest = counted();
    guest.partition.stop_time().unwrap();
    let hour = Clock { elapsed: Duration::from_secs(3600), host_time: Duration::ZERO };
    guest.partition.access_state().set_clock(&hour).unwrap();
    guest
        .partition
        .access_state()
        .set_irq_routes(&IrqRoutes([Some(MsiRequest::nmi(VP)); processor::IOAPIC_PINS]))
        .unwrap();
    guest.partition.scrub(Vtl::Vtl0).unwrap();
    block_on(guest.vps[0].scrub(Vtl::Vtl0)).unwrap();
    let scrubbed = PartitionState::save(&mut *guest.partition.access_state()).unwrap();
    assert_eq!((scrubbed.clock, scrubbed.irq_routes), (Some(hour), Some(IrqRoutes::default())));
    assert_eq!(guest.rip(), 0xfff0);
    guest.reset();
    let reset = PartitionState::save(&mut *guest.partition.access_state()).unwrap();
    assert_eq!(reset.clock.unwrap().elapsed, Duration::ZERO);
}

#[test]
fn a_partition_that_waited_for_its_guest_has_no_time_of_that() {
    for time in [TimePolicy::Hidden, TimePolicy::CatchUp] {
        let config = |memory| PartitionConfig { time, ..PartitionConfig::new(1, memory) };
        let guest = Guest::configured(Mode::Flat, &COUNT, config);
        guest.partition.stop_time().unwrap();
        let clock = || guest.partition.access_state().clock().unwrap().elapsed;
        let counter = || save(&guest).tsc.map(|tsc| (tsc.value, tsc.frequency_khz));
        let (stood, ticked) = (clock(), counter());
        let waits = Instant::now();
        while waits.elapsed() < Duration::from_millis(100) {
            std::thread::yield_now();
        }
        let comes = Instant::now();
        guest.partition.forget_stopped_time();
        guest.partition.start_time().unwrap();
        guest.start();
        guest.stop();
        guest.partition.stop_time().unwrap();
        let passed = clock().checked_sub(stood).expect("it goes on from where it stood");
        let since = comes.elapsed();
        assert!(passed <= since, "{time:?}: {passed:?} have passed in {since:?}");
        if let (Some((before, khz)), Some((after, _))) = (ticked, counter()) {
            let passed = Duration::from_nanos((after - before) * 1_000_000 / u64::from(khz));
            // The counter's frequency is known to about a thousandth.
            let since = comes.elapsed().mul_f64(1.001);
            assert!(passed <= since, "{time:?}: the counter says {passed:?} in {since:?}");
        }
    }
}

#[test]
fn a_vp_that_was_sent_something_is_put_back_by_a_reset_although_it_never_ran() {
    let events = |guest: &Guest| block_on(guest.vps[1].save()).unwrap().events;
    let fresh = events(&Guest::with(Mode::Flat, &COUNT, 2));
    let sent = Guest::with(Mode::Flat, &COUNT, 2);
    sent.partition.inject_nmi(VpIndex(1));
    assert_ne!(events(&sent), fresh, "the interrupt is pending");
    let guest = Guest::with(Mode::Flat, &COUNT, 2);
    guest.partition.inject_nmi(VpIndex(1));
    guest.reset();
    assert_eq!(events(&guest), fresh);
}

#[test]
fn other_trust_levels_are_not_supported() {
    let guest = Guest::new(Mode::Flat, &COUNT);
    let text = "the hypervisor does not support VTL 2";
    assert_eq!(guest.partition.scrub(Vtl::Vtl2).unwrap_err().to_string(), text);
    let error = block_on(guest.vps[0].scrub(Vtl::Vtl2)).unwrap_err();
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), text);
}

#[test]
fn a_non_maskable_interrupt_reaches_a_vp_that_masks_the_others() {
    // cli; hlt; jmp to it. The handler prints N.
    let guest = Guest::new(Mode::Real, &[0xfa, 0xf4, 0xeb, 0xfd]);
    guest.memory.write_obj(0x1800_u32, GuestAddress(2 * 4)).unwrap();
    let print = [0xba, 0xf8, 0x03, 0xb0, b'N', 0xee, 0xcf]; // mov dx, SERIAL; mov al, N; out dx, al; iret
    guest.memory.write_slice(&print, GuestAddress(0x1800)).unwrap();
    guest.start();
    for _ in 0..2 {
        guest.partition.inject_nmi(VP);
        guest.bus.expect("N");
    }
    guest.stop();
    guest.assert_no_halt();
}
