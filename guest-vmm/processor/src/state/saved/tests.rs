//! Every state survives its message, the messages are those of the tables, and what no VP can be in is refused.

use crate::{
    Clock, Cpuid, CpuidLeaf, DebugRegisters, Events, Exception, IOAPIC_PINS, InjectedInterrupt, IrqRoutes,
    LOCAL_APIC_BYTES, LocalApic, MpState, MsiRequest, NumberedRegisters, PartitionState, PartitionStateKind,
    Registers, Segment, StateAccessError, SystemManagement, SystemRegisters, Table, Tsc, VpState,
    VpStateKind, Xsave,
};
use guest_saved_state::FILE_DESCRIPTOR_SET;
use guest_saved_state::processor::{partition, vp};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use prost_reflect::DescriptorPool;
use save_restore::RestoreError;
use std::time::Duration;

/// Numbers and names of a message's fields.
fn fields(message: &str) -> Vec<(u32, String)> {
    let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the compiler's own output");
    let message = pool.get_message_by_name(message).expect("a message of the schema");
    message.fields().map(|field| (field.number(), field.name().to_owned())).collect()
}

#[test]
fn a_messages_fields_are_its_tables() {
    let vp: Vec<_> = VpStateKind::ALL.iter().map(|kind| (kind.number(), kind.name().to_owned())).collect();
    assert_eq!(fields("processor.vp.VpState"), vp);
    let partition = PartitionStateKind::ALL.iter().map(|kind| (kind.number(), kind.name().to_owned()));
    assert_eq!(fields("processor.partition.PartitionState"), partition.collect::<Vec<_>>());
}

fn registers() -> impl Strategy<Value = Registers> {
    any::<[u64; 18]>().prop_map(|all| {
        let [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags] = all;
        #[rustfmt::skip]
        let registers = Registers {
            rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
        };
        registers
    })
}

fn system_registers() -> impl Strategy<Value = SystemRegisters> {
    let segment = any::<(u64, u32, u16, u16)>().prop_map(|(base, limit, selector, attributes)| Segment {
        base,
        limit,
        selector,
        attributes,
    });
    let segments = proptest::array::uniform8(segment);
    let tables = any::<[(u64, u16); 2]>();
    (segments, tables, any::<[u64; 5]>()).prop_map(|(segments, tables, [cr0, cr2, cr3, cr4, efer])| {
        let [cs, ds, es, fs, gs, ss, tr, ldtr] = segments;
        let [gdtr, idtr] = tables.map(|(base, limit)| Table { base, limit });
        SystemRegisters { cs, ds, es, fs, gs, ss, tr, ldtr, gdtr, idtr, cr0, cr2, cr3, cr4, efer }
    })
}

fn cpuid() -> impl Strategy<Value = Cpuid> {
    let leaf = any::<(u32, Option<u32>, [u32; 4])>().prop_map(|(function, index, [eax, ebx, ecx, edx])| {
        CpuidLeaf { function, index, eax, ebx, ecx, edx }
    });
    vec(leaf, 0..5).prop_map(Cpuid)
}

fn numbered() -> impl Strategy<Value = NumberedRegisters> {
    vec(any::<(u32, u64)>(), 0..5).prop_map(NumberedRegisters)
}

fn xsave() -> impl Strategy<Value = Xsave> {
    (144usize..300, any::<u8>()).prop_map(|(words, byte)| Xsave(vec![byte; words * 4]))
}

fn local_apic() -> impl Strategy<Value = LocalApic> {
    (any::<u64>(), vec(any::<u8>(), LOCAL_APIC_BYTES)).prop_map(|(base, registers)| {
        let registers = registers.try_into().expect("as many bytes as a local APIC has");
        LocalApic { base, registers }
    })
}

fn events() -> impl Strategy<Value = Events> {
    let exception =
        any::<(u8, Option<u32>, Option<u64>, bool)>().prop_map(|(vector, error_code, payload, injected)| {
            Exception { vector, error_code, payload, injected }
        });
    let interrupt = any::<(u8, bool)>().prop_map(|(vector, soft)| InjectedInterrupt { vector, soft });
    let system_management = any::<[bool; 4]>().prop_map(|[active, pending, inside_nmi, latched_init]| {
        SystemManagement { active, pending, inside_nmi, latched_init }
    });
    (option::of(exception), option::of(interrupt), any::<[bool; 5]>(), 0u8..=2, system_management).prop_map(
        |(exception, interrupt, flags, nmis_pending, system_management)| {
            let [shadow_of_sti, shadow_of_mov_ss, nmi_injected, nmi_masked, triple_fault_pending] = flags;
            Events {
                exception,
                interrupt,
                shadow_of_sti,
                shadow_of_mov_ss,
                nmi_injected,
                nmis_pending,
                nmi_masked,
                system_management,
                triple_fault_pending,
            }
        },
    )
}

fn mp_state() -> impl Strategy<Value = MpState> {
    prop_oneof![Just(MpState::Runnable), Just(MpState::Halted), Just(MpState::WaitForSipi)]
}

/// A VP's state as any hypervisor may have it.
fn vp_state() -> impl Strategy<Value = VpState> {
    let debug_registers = any::<([u64; 4], u64, u64)>()
        .prop_map(|(breakpoints, status, control)| DebugRegisters { breakpoints, status, control });
    let tsc = any::<(u64, u64, u32)>().prop_map(|(value, adjust, frequency_khz)| Tsc {
        value,
        adjust,
        frequency_khz,
    });
    let always = (system_registers(), registers(), mp_state());
    let early = (option::of(cpuid()), option::of(numbered()), option::of(xsave()));
    let late = (option::of(debug_registers), option::of(tsc), option::of(local_apic()));
    let last = (option::of(numbered()), option::of(events()));
    (always, early, late, last).prop_map(|(always, early, late, last)| {
        let (system_registers, registers, mp_state) = always;
        let ((cpuid, xcrs, xsave), (debug_registers, tsc, local_apic), (msrs, events)) = (early, late, last);
        VpState {
            cpuid,
            system_registers: Some(system_registers),
            registers: Some(registers),
            xcrs,
            xsave,
            debug_registers,
            tsc,
            local_apic,
            msrs,
            events,
            mp_state: Some(mp_state),
        }
    })
}

fn partition_state() -> impl Strategy<Value = PartitionState> {
    let duration = || (any::<u64>(), 0u32..1_000_000_000).prop_map(|(s, ns)| Duration::new(s, ns));
    let clock = (duration(), duration()).prop_map(|(elapsed, host_time)| Clock { elapsed, host_time });
    let route = any::<(u64, u32)>().prop_map(|(address, data)| MsiRequest { address, data });
    let routes = vec(option::of(route), IOAPIC_PINS)
        .prop_map(|routes| IrqRoutes(routes.try_into().expect("as many as there are pins")));
    (option::of(clock), option::of(routes))
        .prop_map(|(clock, irq_routes)| PartitionState { clock, irq_routes })
}

proptest! {
    #[test]
    fn any_state_of_a_vp_survives_its_message(state in vp_state()) {
        prop_assert_eq!(VpState::try_from(vp::VpState::from(&state)).expect("its own message"), state);
    }

    #[test]
    fn any_state_of_a_partition_survives_its_message(state in partition_state()) {
        let message = partition::PartitionState::from(&state);
        prop_assert_eq!(PartitionState::try_from(message).expect("its own message"), state);
    }
}

/// A VP's message with every state in it.
fn whole() -> vp::VpState {
    vp::VpState::from(&VpState {
        cpuid: Some(Cpuid(vec![CpuidLeaf::default()])),
        system_registers: Some(SystemRegisters::default()),
        registers: Some(Registers::default()),
        xcrs: Some(NumberedRegisters(vec![(0, 1)])),
        xsave: Some(Xsave(vec![0; 576])),
        debug_registers: Some(DebugRegisters::default()),
        tsc: Some(Tsc::default()),
        local_apic: Some(LocalApic { base: 0, registers: Box::new([0; LOCAL_APIC_BYTES]) }),
        msrs: Some(NumberedRegisters::default()),
        events: Some(Events {
            exception: Some(Exception::default()),
            interrupt: Some(InjectedInterrupt::default()),
            ..Events::default()
        }),
        mp_state: Some(MpState::Runnable),
    })
}

/// What a VP's message is refused for, once `spoil` has changed it.
fn refusal(spoil: impl FnOnce(&mut vp::VpState) -> Option<()>) -> String {
    let mut state = whole();
    assert!(VpState::try_from(state.clone()).is_ok());
    spoil(&mut state).expect("every state is in it");
    VpState::try_from(state).unwrap_err().to_string()
}

/// Sets what is at the end of a chain of fields, each of which is there.
macro_rules! spoiled {
    ($($field:ident).+ [] $last:ident = $value:expr) => {
        refusal(|state| { state$(.$field.as_mut()?)+.$last = $value; Some(()) })
    };
}

#[test]
fn what_no_vp_can_be_in_is_refused_by_field_and_value() {
    let refusals = [
        (spoiled!(system_registers.cs[] selector = 0x1_0000), "system_registers.cs.selector is 65536"),
        (spoiled!(system_registers.ldtr[] attributes = 65537), "system_registers.ldtr.attributes is 65537"),
        (spoiled!(system_registers.idtr[] limit = u32::MAX), "system_registers.idtr.limit is 4294967295"),
        (spoiled!(system_registers[] ss = None), "system_registers.ss is absent"),
        (spoiled!(system_registers[] gdtr = None), "system_registers.gdtr is absent"),
        (spoiled!(debug_registers[] breakpoints = vec![0; 3]), "debug_registers.breakpoints is 3 registers"),
        (spoiled!(local_apic[] registers = vec![0; 1023]), "local_apic.registers is 1023 bytes long"),
        (spoiled!(local_apic[] registers = vec![0; 4096]), "local_apic.registers is 4096 bytes long"),
        (spoiled!(events.exception[] vector = 256), "events.exception.vector is 256"),
        (spoiled!(events.interrupt[] vector = 300), "events.interrupt.vector is 300"),
        (spoiled!(events[] nmis_pending = 3), "events.nmis_pending is 3"),
        (spoiled!(events[] nmis_pending = 256), "events.nmis_pending is 256"),
        (spoiled!(events[] system_management = None), "events.system_management is absent"),
        (refused_xsave(0), "xsave is 0 bytes long"),
        (refused_xsave(575), "xsave is 575 bytes long"),
        (refused_xsave(577), "xsave is 577 bytes long"),
        (refused(|state| state.mp_state = Some(0)), "mp_state is 0"),
        (refused(|state| state.mp_state = Some(4)), "mp_state is 4"),
        (refused(|state| state.mp_state = Some(-1)), "mp_state is -1"),
        (refused(|state| state.mp_state = None), "mp_state is absent"),
        (refused(|state| state.registers = None), "registers is absent"),
        (refused(|state| state.system_registers = None), "system_registers is absent"),
    ];
    for (refusal, expected) in refusals {
        assert_eq!(refusal, format!("{expected}, which is not valid"));
    }
}

fn refused(spoil: impl FnOnce(&mut vp::VpState)) -> String {
    refusal(|state| {
        spoil(state);
        Some(())
    })
}

fn refused_xsave(bytes: usize) -> String {
    refused(|state| state.xsave = Some(vec![0; bytes]))
}

#[test]
fn what_no_partition_can_be_in_is_refused_by_field_and_value() {
    let second = || Some(partition::Time { seconds: 1, nanoseconds: 0 });
    let clock = |elapsed, host_time| partition::PartitionState {
        clock: Some(partition::Clock { elapsed, host_time }),
        irq_routes: None,
    };
    let route = |pin| partition::IrqRoute { pin, address: 0xfee0_0000, data: 0x30 };
    let routes = |pins: &[u32]| partition::PartitionState {
        clock: None,
        irq_routes: Some(partition::IrqRoutes { routes: pins.iter().copied().map(route).collect() }),
    };
    let late = Some(partition::Time { seconds: 1, nanoseconds: 1_000_000_000 });
    for (state, expected) in [
        (clock(None, second()), "clock.elapsed is absent"),
        (clock(second(), None), "clock.host_time is absent"),
        (clock(late, second()), "clock.elapsed.nanoseconds is 1000000000"),
        (routes(&[1, 96]), "irq_routes.routes.pin is 96"),
        (routes(&[u32::MAX]), "irq_routes.routes.pin is 4294967295"),
        (routes(&[3, 4, 3]), "irq_routes.routes.pin is 3 twice"),
    ] {
        let refusal = PartitionState::try_from(state).unwrap_err();
        assert_eq!(refusal.to_string(), format!("{expected}, which is not valid"));
    }
    assert!(PartitionState::try_from(clock(second(), second())).is_ok());
    assert!(PartitionState::try_from(routes(&[0, 23])).is_ok());
}

#[test]
fn a_state_that_the_host_lacks_is_not_supported_and_named() {
    let lacking = StateAccessError::Lacking(vec![VpStateKind::Tsc, VpStateKind::Msrs]);
    let error = RestoreError::from(lacking);
    assert!(matches!(error, RestoreError::NotSupported { .. }));
    assert_eq!(error.to_string(), "restoring is not supported: this host lacks the state tsc, msrs");
    let error = RestoreError::from(StateAccessError::ReadBack(vec![VpStateKind::Xcrs]));
    assert!(matches!(error, RestoreError::Other(_)));
}
