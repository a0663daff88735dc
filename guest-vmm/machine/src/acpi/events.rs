//! What the tables say of what happens to a guest: the Generic Event Device (ACPI 6.5, 5.6.9) and the devices that it tells of, the
//! power button (4.8.3.2.2.1) and the VM generation ID; and of pvpanic, by which the guest tells of itself.

use super::DeviceNode;
use crate::layout;
use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If,
    Interrupt, Local, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Store,
    ZERO,
};
use acpi_tables::{Aml, AmlSink};
use devices::{GenericEvent, GenericEventDevice, Pvpanic};

const POWER_BUTTON: &str = "PWRB";
const GENERATION_ID: &str = "VGID";
/// What the Generic Event Device's register is called, and where its method keeps what it has read.
const PENDING: &[u8; 4] = b"PEND";
const TAKEN: Local = Local(0);

/// What is notified. To a power button: it was pressed (ACPI 6.5, table 5.165). To a generation ID: it has changed.
const NOTIFICATION: u8 = 0x80;

/// Nodes one after the other.
struct Sequence<'a>(&'a [&'a dyn Aml]);

impl Aml for Sequence<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        self.0.iter().for_each(|aml| aml.to_aml_bytes(sink));
    }
}

/// Notifies the device of this name if the event is among those taken.
struct NotifyOf(GenericEvent, &'static str);

impl Aml for NotifyOf {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (bit, device) = (self.0.bit(), Path::new(self.1));
        let is_taken = And::new(&ZERO, &TAKEN, &bit);
        If::new(&is_taken, vec![&Notify::new(&device, &NOTIFICATION)]).to_aml_bytes(sink);
    }
}

/// The Generic Event Device and the power button, which has no registers of its own. The other device that is told of events is
/// [`generation_id`], which has to be in the tables too.
pub fn generic_event_device() -> DeviceNode {
    let interrupt = Interrupt::new(true, true, false, false, layout::GENERIC_EVENT_IRQ.into());
    let device = DeviceNode::new(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
            &register(),
            &event_method(),
        ],
    ));
    let button = DeviceNode::new(&Device::new(
        POWER_BUTTON.into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &ZERO)],
    ));
    DeviceNode::new(&Sequence(&[&device, &button]))
}

/// The register of pending events.
fn register() -> DeviceNode {
    let (port, ports) = (layout::GENERIC_EVENT_PORT, GenericEventDevice::PORTS);
    let region = OpRegion::new("EVTS".into(), OpRegionSpace::SystemIO, &port, &ports);
    let field = Field::new(
        "EVTS".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![FieldEntry::Named(*PENDING, 8)],
    );
    DeviceNode::new(&Sequence(&[&region, &field]))
}

/// What is done when the interrupt comes. To read the register is to take what it says: it is read once.
fn event_method() -> DeviceNode {
    let pending = Path::new(str::from_utf8(PENDING).expect("a name of ASCII"));
    let take = Store::new(&TAKEN, &pending);
    let button = NotifyOf(GenericEvent::PowerButton, POWER_BUTTON);
    let id = NotifyOf(GenericEvent::GenerationId, GENERATION_ID);
    DeviceNode::new(&Method::new("_EVT".into(), 1, true, vec![&take, &button, &id]))
}

/// The VM generation ID, at its place in memory, whose halves ADDR gives. Linux knows it by the one name, Windows by the other.
pub fn generation_id() -> DeviceNode {
    let address = layout::GENERATION_ID.start;
    let halves = [address, address >> 32].map(|half| half & u64::from(u32::MAX));
    DeviceNode::new(&Device::new(
        GENERATION_ID.into(),
        vec![
            &Name::new("_HID".into(), &"VMGENCTR"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&halves[0], &halves[1]])),
        ],
    ))
}

/// pvpanic.
pub fn pvpanic() -> DeviceNode {
    let (port, ports) = (layout::PVPANIC_PORT, super::port_count(Pvpanic::PORTS));
    DeviceNode::new(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(port, port, 1, ports)])),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::bytes_of;

    fn contains(node: &DeviceNode, wanted: &[u8]) -> bool {
        bytes_of(node).windows(wanted.len()).any(|bytes| bytes == wanted)
    }

    #[test]
    fn the_generic_event_device_has_an_edge_and_a_register() {
        let node = generic_event_device();
        assert!(contains(&node, b"_HID\x0dACPI0013\0"));
        assert!(contains(&node, b"\x89\x06\x00\x03\x01\x09\x00\x00\x00"), "interrupt 9, an edge");
        assert!(contains(&node, b"\x5b\x80EVTS\x01\x0b\x04\x06\x01"), "one port at 0x604");
        assert!(contains(&node, b"\x5b\x81\x0bEVTS\x01PEND\x08"), "its eight bits, read as a byte");
        assert!(contains(&node, b"_HID\x0c\x41\xd0\x0c\x0c"), "PNP0C0C");
    }

    /// Store (PEND, Local0), then If (And (Local0, bit)) { Notify (device, 0x80) } for each (ACPI 6.5, 20.2.5).
    #[test]
    fn its_method_reads_once_and_notifies_whom_it_concerns() {
        let node = generic_event_device();
        let body = b"_EVT\x09\x70PEND\x60\xa0\x0c\x7b\x60\x01\x00\x86PWRB\x0a\x80\xa0\x0d\x7b\x60\x0a\x02\x00\x86VGID\x0a\x80";
        assert!(contains(&node, body), "{:x?}", bytes_of(&node));
    }

    #[test]
    fn the_generation_id_is_where_the_memory_map_says() {
        let node = generation_id();
        assert!(contains(&node, b"ADDR\x12\x08\x02\x0c\x00\xe0\x0f\x00\x00"), "{:x?}", bytes_of(&node));
        assert!(contains(&node, b"_CID\x0dVM_Gen_Counter\0"));
        assert_eq!(layout::GENERATION_ID.start % 4096, 0);
    }

    #[test]
    fn pvpanic_is_at_its_port() {
        let node = pvpanic();
        assert!(contains(&node, b"_HID\x0dQEMU0001\0"));
        assert!(contains(&node, b"\x47\x01\x05\x05\x05\x05\x01\x01"));
    }
}
