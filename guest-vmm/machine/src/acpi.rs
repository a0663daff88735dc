//! The ACPI tables (ACPI specification 6.5, chapter 5): hardware-reduced, so that a guest needs neither PIC, PIT nor PM timer.
//!
//! RSDP, XSDT, FADT, MADT and DSDT lie in [`layout::ACPI_AREA`], the RSDP first, where it is found with or without being told.
//! A device describes itself by a [`DeviceNode`] in the DSDT; those that tell of events are in [`events`].
//!
//! Limits: VP n has local APIC n, up to 254 of them (255 addresses all); no hot-plug, no sleep but S4 and S5.

use crate::layout;
use acpi_tables::aml::{
    self, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, fadt};
use devices::{AcpiPower, Rtc, SerialPort};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

pub mod events;

/// The most VPs that the tables can describe.
pub const MAX_VPS: u32 = 254;

const OEM_ID: [u8; 6] = *b"GUESTD";
const OEM_TABLE_ID: [u8; 8] = *b"GUESTVMM";
const OEM_REVISION: u32 = 1;

/// Where the century is in the CMOS RAM.
const CENTURY_REGISTER: u8 = 0x32;
/// IA-PC boot flag 2: VGA not present. Flags 1 (keyboard controller) and 5 (no CMOS RTC) stay clear: the one is not announced, the
/// other is there.
const BOOT_VGA_NOT_PRESENT: u16 = 1 << 2;
const TABLE_ALIGNMENT: u64 = 16;
const TABLE_HEADER_BYTES: u32 = 36;
/// The DSDT revision from which on AML integers have 64 bits.
const DSDT_REVISION: u8 = 2;

/// Why the tables cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// No VP, or more than the tables can describe.
    #[error("{vps} VPs cannot be described: from 1 to {MAX_VPS} can")]
    VpCount {
        /// How many VPs there are.
        vps: u32,
    },
    /// There are too many devices.
    #[error("ACPI tables of {bytes} bytes are too large: {limit} bytes are there for them")]
    TooLarge {
        /// The size of the tables.
        bytes: u64,
        /// The size of [`layout::ACPI_AREA`].
        limit: u64,
    },
    /// There is no memory in [`layout::ACPI_AREA`].
    #[error("cannot write {bytes} bytes of ACPI tables")]
    Memory {
        /// The size of the tables.
        bytes: u64,
        /// What the memory said.
        #[source]
        source: GuestMemoryError,
    },
}

/// A device's description in the DSDT, below `\_SB`: AML code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNode(Vec<u8>);

impl DeviceNode {
    /// The description that some AML objects make, usually one [`Device`].
    pub fn new(aml: &dyn Aml) -> Self {
        Self(bytes_of(aml))
    }
}

impl Aml for DeviceNode {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// The first serial port: a 16550A at its old place, its interrupt an edge.
pub fn serial_port() -> DeviceNode {
    let (first, ports) = (layout::COM1_PORT, port_count(SerialPort::PORTS));
    DeviceNode::new(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, layout::COM1_IRQ.into()),
                    &IO::new(first, first, 1, ports),
                ]),
            ),
        ],
    ))
}

/// The real-time clock, which has no interrupt.
pub fn real_time_clock() -> DeviceNode {
    let (first, ports) = (layout::RTC_PORT, port_count(Rtc::PORTS));
    DeviceNode::new(&Device::new(
        "RTC_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(first, first, 1, ports)])),
        ],
    ))
}

/// A virtio device behind the MMIO transport, as Linux finds it (LNRO0005), its interrupt an edge.
pub fn virtio_mmio(index: u8, base: u64, bytes: u64, pin: u8) -> DeviceNode {
    DeviceNode::new(&Device::new(
        format!("V{index:03}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, register_address(base), register_address(bytes)),
                    &Interrupt::new(true, true, false, false, pin.into()),
                ]),
            ),
        ],
    ))
}

fn port_count(ports: u16) -> u8 {
    u8::try_from(ports).expect("a device of the board has few ports")
}

/// Writes the tables into guest memory and gives the address of the RSDP, for the loader.
///
/// Devices are described in the order given.
pub fn write_tables(
    memory: &GuestMemoryMmap,
    vps: u32,
    devices: &[DeviceNode],
) -> Result<GuestAddress, AcpiError> {
    let apic_ids = apic_ids(vps)?;
    let mut tables = Tables::new();
    let dsdt = tables.add(&dsdt(devices));
    let fadt = tables.add(&fadt(dsdt));
    let madt = tables.add(&madt(apic_ids));
    let xsdt = tables.add(&xsdt(&[fadt, madt]));
    let area = tables.finish(xsdt);
    let (bytes, limit) = (area.len() as u64, layout::ACPI_AREA.end - layout::ACPI_AREA.start);
    if bytes > limit {
        return Err(AcpiError::TooLarge { bytes, limit });
    }
    let address = GuestAddress(layout::ACPI_AREA.start);
    memory.write_slice(&area, address).map_err(|source| AcpiError::Memory { bytes, source })?;
    Ok(address)
}

fn apic_ids(vps: u32) -> Result<std::ops::Range<u8>, AcpiError> {
    let in_range = (1..=MAX_VPS).contains(&vps);
    let end = u8::try_from(vps).ok().filter(|_| in_range).ok_or(AcpiError::VpCount { vps })?;
    Ok(0..end)
}

/// The tables one after the other, as they will lie in [`layout::ACPI_AREA`], the RSDP's place kept free.
struct Tables(Vec<u8>);

impl Tables {
    fn new() -> Self {
        Self(vec![0; Rsdp::len()])
    }

    /// Appends a table and gives its guest physical address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let offset = (self.0.len() as u64).next_multiple_of(TABLE_ALIGNMENT);
        self.0.resize(usize::try_from(offset).expect("a small table"), 0);
        table.to_aml_bytes(&mut self.0);
        layout::ACPI_AREA.start + offset
    }

    fn finish(mut self, xsdt: u64) -> Vec<u8> {
        let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
        self.0[..rsdp.len()].copy_from_slice(&rsdp);
        self.0
    }
}

fn bytes_of(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

fn dsdt(devices: &[DeviceNode]) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", TABLE_HEADER_BYTES, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let nodes = devices.iter().map(|node| node as &dyn Aml).collect();
    dsdt.append_slice(&bytes_of(&aml::Scope::new("\\_SB_".into(), nodes)));
    for (name, sleep_type) in [("\\_S4_", AcpiPower::SLEEP_TYPE_S4), ("\\_S5_", AcpiPower::SLEEP_TYPE_S5)] {
        let package = Package::new(vec![&sleep_type]);
        dsdt.append_slice(&bytes_of(&Name::new(name.into(), &package)));
    }
    dsdt
}

fn fadt(dsdt: u64) -> fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Neither a power button nor a sleep button is a fixed register.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.century = CENTURY_REGISTER;
    fadt.iapc_boot_arch = BOOT_VGA_NOT_PRESENT.into();
    fadt.sleep_control_reg = power_register(AcpiPower::SLEEP_CONTROL);
    fadt.sleep_status_reg = power_register(AcpiPower::SLEEP_STATUS);
    fadt.reset_reg = power_register(AcpiPower::RESET);
    fadt.reset_value = AcpiPower::RESET_VALUE;
    fadt.finalize()
}

fn power_register(offset: u16) -> GAS {
    let port = u64::from(layout::ACPI_POWER_PORT + offset);
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

/// The interrupt controllers. PCAT_COMPAT stays clear: there is no 8259.
fn madt(apic_ids: std::ops::Range<u8>) -> MADT {
    let local = LocalInterruptController::Address(register_address(layout::LOCAL_APIC));
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    for id in apic_ids {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, register_address(layout::IOAPIC), 0));
    madt
}

fn register_address(address: u64) -> u32 {
    u32::try_from(address).expect("registers are below 4 GiB")
}

fn xsdt(tables: &[u64]) -> XSDT {
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for address in tables {
        xsdt.add_entry(*address);
    }
    xsdt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn read(memory: &GuestMemoryMmap, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn number(bytes: &[u8]) -> u64 {
        bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Reads a table as a guest does: its length from its header, its checksum, its place.
    fn table(memory: &GuestMemoryMmap, address: u64) -> Vec<u8> {
        let length = number(&read(memory, address + 4, 4));
        assert!(address >= 0xe_0000 && address + length <= 0xf_e000);
        let bytes = read(memory, address, usize::try_from(length).unwrap());
        assert_eq!(sum(&bytes), 0, "checksum of {:?}", String::from_utf8_lossy(&bytes[..4]));
        bytes
    }

    /// The tables by their signatures, found from the RSDP.
    fn written(vps: u32) -> Vec<(String, Vec<u8>)> {
        let memory = memory();
        let nodes =
            [serial_port(), real_time_clock(), events::generic_event_device(), events::generation_id()];
        let rsdp = write_tables(&memory, vps, &nodes).unwrap();
        assert_eq!(rsdp, GuestAddress(0xe_0000));
        let rsdp = read(&memory, rsdp.0, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp), rsdp[15]), (0, 0, 2));
        let xsdt = table(&memory, number(&rsdp[24..32]));
        assert_eq!(&xsdt[..4], b"XSDT");
        let mut tables: Vec<_> = xsdt[36..].chunks(8).map(|entry| table(&memory, number(entry))).collect();
        let fadt = tables.iter().find(|table| table.starts_with(b"FACP")).unwrap();
        tables.push(table(&memory, number(&fadt[140..148])));
        tables.into_iter().map(|table| (String::from_utf8(table[..4].to_vec()).unwrap(), table)).collect()
    }

    fn find(vps: u32, signature: &str) -> Vec<u8> {
        written(vps).into_iter().find(|(name, _)| name == signature).unwrap().1
    }

    #[test]
    fn all_tables_are_reachable() {
        let names: Vec<_> = written(1).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["FACP", "APIC", "DSDT"]);
    }

    #[test]
    fn the_fadt_describes_power_off_and_reset() {
        let fadt = find(1, "FACP");
        let register = |at: usize| (number(&fadt[at..at + 4]), number(&fadt[at + 4..at + 12]));
        let byte_port = 1 | 8 << 8 | 1 << 24;
        assert_eq!(register(116), (byte_port, 0x602));
        assert_eq!(fadt[128], 1, "the reset value");
        assert_eq!(register(244), (byte_port, 0x600));
        assert_eq!(register(256), (byte_port, 0x601));
        let flags = number(&fadt[112..116]);
        assert_eq!(flags >> 20 & 1, 1, "hardware-reduced");
        assert_eq!(flags >> 10 & 1, 1, "with a reset register");
        assert_eq!(fadt[108], 0x32);
        assert_eq!(number(&fadt[109..111]), 1 << 2);
    }

    #[test]
    fn the_madt_lists_each_local_apic_and_the_ioapic() {
        for vps in [1, 2, MAX_VPS] {
            let madt = find(vps, "APIC");
            assert_eq!(number(&madt[36..40]), 0xfee0_0000);
            assert_eq!(number(&madt[40..44]), 0, "no 8259");
            let count = usize::try_from(vps).unwrap();
            let (local, ioapic) = madt[44..].split_at(8 * count);
            for (id, entry) in (0u8..).zip(local.chunks(8)) {
                assert_eq!(entry, [0, 8, id, id, 1, 0, 0, 0]);
            }
            assert_eq!(ioapic, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        }
    }

    #[test]
    fn the_dsdt_describes_the_devices_s4_and_s5() {
        let dsdt = find(1, "DSDT");
        let contains = |wanted: &[u8]| dsdt.windows(wanted.len()).any(|bytes| bytes == wanted);
        // EISA identifiers are compressed: 5 bits a letter, then the number.
        assert!(contains(b"_HID\x0c\x41\xd0\x05\x01"), "PNP0501");
        assert!(contains(b"_HID\x0c\x41\xd0\x0b\x00"), "PNP0B00");
        assert!(contains(b"\x47\x01\xf8\x03\xf8\x03\x01\x08"), "ports 0x3f8 to 0x3ff");
        assert!(contains(b"\x47\x01\x70\x00\x70\x00\x01\x02"), "ports 0x70 and 0x71");
        assert!(contains(b"\x89\x06\x00\x03\x01\x04\x00\x00\x00"), "interrupt 4, an edge");
        assert!(contains(b"\x08\\_S4_\x12\x04\x01\x0a\x04"), "S4 is sleep type 4");
        assert!(contains(b"\x08\\_S5_\x12\x04\x01\x0a\x05"), "S5 is sleep type 5");
    }

    #[test]
    fn vp_counts_that_cannot_be_described_are_refused() {
        for vps in [0, 255, u32::MAX] {
            let error = write_tables(&memory(), vps, &[]).unwrap_err();
            assert_eq!(error.to_string(), format!("{vps} VPs cannot be described: from 1 to 254 can"));
        }
    }

    #[test]
    fn too_many_devices_are_refused() {
        let nodes = vec![serial_port(); 5000];
        let error = write_tables(&memory(), 1, &nodes).unwrap_err();
        assert!(matches!(error, AcpiError::TooLarge { limit: 0x1_e000, .. }), "{error}");
    }
}
