//! The bus: which device answers at which port and guest physical address.
//!
//! A [`BusBuilder`] collects windows and refuses overlaps; the [`Bus`] it builds is immutable, so VPs look devices up without a
//! lock. The device's own lock is held for one access.
//!
//! An access that lies in one window goes to its device whole. Any other is taken apart into bytes, each of which finds its own
//! device or none, as the ISA bus takes apart accesses wider than a device.

use crate::layout;
use devices::{IoApic, IoDevice};
use processor::{CpuIo, PowerRequest, VpIndex};
use std::fmt;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device as the bus holds it: locked for one access.
pub type SharedDevice = Arc<Mutex<dyn IoDevice>>;

/// What a window's addresses are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// I/O ports, from 0 to 0xffff.
    Ports,
    /// Guest physical addresses.
    Memory,
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ports => "ports",
            Self::Memory => "addresses",
        })
    }
}

impl Space {
    /// The first address past the space's end.
    fn end(self) -> u64 {
        match self {
            Self::Ports => 1 << 16,
            // The last byte stays out, so that every window's end is a number.
            Self::Memory => u64::MAX,
        }
    }
}

/// Why a window cannot be on the bus.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// It shares addresses with another.
    #[error(
        "{space} {:#x}..{:#x} of {name} overlap {:#x}..{:#x} of {other}",
        .range.start, .range.end, .other_range.start, .other_range.end
    )]
    Overlap {
        /// What the addresses are.
        space: Space,
        /// The device that was to be added.
        name: String,
        /// Its window.
        range: Range<u64>,
        /// The device that is there.
        other: String,
        /// The window of that device.
        other_range: Range<u64>,
    },
    /// It is empty, or goes beyond the space.
    #[error("{length:#x} {space} from {base:#x} of {name} are not a window")]
    NoWindow {
        /// What the addresses are.
        space: Space,
        /// The device.
        name: String,
        /// The first address.
        base: u64,
        /// How many addresses.
        length: u64,
    },
}

struct Window {
    range: Range<u64>,
    name: String,
    device: SharedDevice,
}

impl Window {
    fn lock(&self) -> MutexGuard<'_, dyn IoDevice + 'static> {
        // A device that has panicked has taken its VP thread with it, which is reported there.
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The windows of one space, in ascending order, apart from each other.
struct Windows {
    space: Space,
    sorted: Vec<Window>,
}

impl Windows {
    fn new(space: Space) -> Self {
        Self { space, sorted: Vec::new() }
    }

    fn add(&mut self, name: &str, base: u64, length: u64, device: SharedDevice) -> Result<(), BusError> {
        let space = self.space;
        let end = base.checked_add(length).filter(|end| *end <= space.end() && length > 0);
        let Some(end) = end else {
            return Err(BusError::NoWindow { space, name: name.to_owned(), base, length });
        };
        let (range, name) = (base..end, name.to_owned());
        let position = self.sorted.partition_point(|window| window.range.end <= base);
        if let Some(there) = self.sorted.get(position).filter(|window| window.range.start < end) {
            let (other, other_range) = (there.name.clone(), there.range.clone());
            return Err(BusError::Overlap { space, name, range, other, other_range });
        }
        self.sorted.insert(position, Window { range, name, device });
        Ok(())
    }

    fn find(&self, address: u64) -> Option<&Window> {
        let position = self.sorted.partition_point(|window| window.range.end <= address);
        self.sorted.get(position).filter(|window| window.range.start <= address)
    }

    /// The window that an access lies in, whole.
    fn find_whole(&self, address: u64, length: usize) -> Option<&Window> {
        let end = address.checked_add(u64::try_from(length).ok()?)?;
        self.find(address).filter(|window| end <= window.range.end)
    }

    fn read(&self, address: u64, data: &mut [u8]) {
        if let Some(window) = self.find_whole(address, data.len()) {
            window.lock().read(address - window.range.start, data);
        } else if let [byte] = data {
            *byte = 0xff;
        } else {
            for (at, byte) in data.chunks_mut(1).enumerate() {
                self.read(self.byte_address(address, at), byte);
            }
        }
    }

    fn write(&self, address: u64, data: &[u8]) -> ControlFlow<PowerRequest> {
        if let Some(window) = self.find_whole(address, data.len()) {
            return window.lock().write(address - window.range.start, data);
        }
        if data.len() <= 1 {
            return ControlFlow::Continue(());
        }
        let mut bytes = data.chunks(1).enumerate();
        bytes.try_for_each(|(at, byte)| self.write(self.byte_address(address, at), byte))
    }

    /// The address of an access's byte. Beyond the space's last address there is nothing: addresses do not wrap.
    fn byte_address(&self, address: u64, at: usize) -> u64 {
        address.saturating_add(at as u64).min(self.space.end())
    }
}

/// Collects the windows of a bus.
pub struct BusBuilder {
    ports: Windows,
    memory: Windows,
    ioapic: Arc<Mutex<IoApic>>,
}

impl BusBuilder {
    /// A bus with nothing on it but the IOAPIC, which gets the ends of interrupts.
    pub fn new(ioapic: Arc<Mutex<IoApic>>) -> Self {
        let mut memory = Windows::new(Space::Memory);
        memory
            .add("ioapic", layout::IOAPIC, IoApic::WINDOW_BYTES, ioapic.clone())
            .expect("a window on an empty bus");
        Self { ports: Windows::new(Space::Ports), memory, ioapic }
    }

    /// Adds a window of `count` ports. A device may have several windows.
    pub fn ports(&mut self, name: &str, base: u16, count: u16, device: SharedDevice) -> Result<(), BusError> {
        self.ports.add(name, base.into(), count.into(), device)
    }

    /// Adds a window of `bytes` guest physical addresses. There must be no memory there.
    pub fn mmio(&mut self, name: &str, base: u64, bytes: u64, device: SharedDevice) -> Result<(), BusError> {
        self.memory.add(name, base, bytes, device)
    }

    /// The bus.
    pub fn build(self) -> Bus {
        Bus { ports: self.ports, memory: self.memory, ioapic: self.ioapic }
    }
}

/// The devices of a machine as its VPs see them.
pub struct Bus {
    ports: Windows,
    memory: Windows,
    ioapic: Arc<Mutex<IoApic>>,
}

impl Bus {
    /// The windows: space, addresses, and the device's name, in ascending order of space and address.
    pub fn windows(&self) -> impl Iterator<Item = (Space, &Range<u64>, &str)> {
        let spaces = [&self.ports, &self.memory].into_iter();
        spaces.flat_map(|windows| windows.sorted.iter().map(|w| (windows.space, &w.range, w.name.as_str())))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.windows()).finish()
    }
}

impl CpuIo for Bus {
    fn read_io(&self, _vp: VpIndex, port: u16, data: &mut [u8]) {
        self.ports.read(port.into(), data);
    }

    fn write_io(&self, _vp: VpIndex, port: u16, data: &[u8]) -> ControlFlow<PowerRequest> {
        self.ports.write(port.into(), data)
    }

    fn read_mmio(&self, _vp: VpIndex, address: u64, data: &mut [u8]) {
        self.memory.read(address, data);
    }

    fn write_mmio(&self, _vp: VpIndex, address: u64, data: &[u8]) -> ControlFlow<PowerRequest> {
        self.memory.write(address, data)
    }

    fn handle_eoi(&self, vector: u8) {
        self.ioapic.lock().unwrap_or_else(PoisonError::into_inner).end_of_interrupt(vector);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::{AcpiPower, IoApicRouting, IrqLine};
    use processor::MsiRequest;
    use proptest::prelude::*;

    const VP: VpIndex = VpIndex(0);

    /// A device that shows where it was read, and keeps what was written.
    struct Probe {
        mark: u8,
        written: Vec<(u64, Vec<u8>)>,
    }

    impl IoDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.mark + u8::try_from(offset).unwrap());
        }

        fn write(&mut self, offset: u64, data: &[u8]) -> ControlFlow<PowerRequest> {
            self.written.push((offset, data.to_vec()));
            ControlFlow::Continue(())
        }

        fn reset(&mut self) {}
    }

    fn probe(mark: u8) -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe { mark, written: Vec::new() }))
    }

    #[derive(Clone, Default)]
    struct Count(Arc<Mutex<usize>>);

    impl IoApicRouting for Count {
        fn set_irq_route(&self, _: u8, _: Option<MsiRequest>) {}

        fn assert_irq(&self, _: u8, _: MsiRequest) {
            *self.0.lock().unwrap() += 1;
        }
    }

    fn builder() -> BusBuilder {
        BusBuilder::new(Arc::new(Mutex::new(IoApic::new(Box::new(Count::default())))))
    }

    fn read_io(bus: &Bus, port: u16, width: usize) -> Vec<u8> {
        let mut data = vec![0x55; width];
        bus.read_io(VP, port, &mut data);
        data
    }

    #[test]
    fn accesses_reach_the_device_at_its_offset() {
        let (mut builder, device) = (builder(), probe(0x10));
        builder.ports("probe", 0x300, 8, device.clone()).unwrap();
        builder.mmio("probe", 0xd000_0000, 0x20, device.clone()).unwrap();
        let bus = builder.build();
        assert_eq!(read_io(&bus, 0x304, 4), [0x14; 4]);
        let mut data = [0; 8];
        bus.read_mmio(VP, 0xd000_0018, &mut data);
        assert_eq!(data, [0x28; 8]);
        assert!(bus.write_mmio(VP, 0xd000_0008, &[1, 2]).is_continue());
        assert!(bus.write_io(VP, 0x301, &[3]).is_continue());
        assert_eq!(device.lock().unwrap().written, [(8, vec![1, 2]), (1, vec![3])]);
    }

    #[test]
    fn where_nothing_is_all_ones_are_read_and_writes_ignored() {
        let bus = builder().build();
        assert_eq!(read_io(&bus, 0x2e8, 4), [0xff; 4]);
        assert!(bus.write_io(VP, 0xffff, &[1, 2, 3, 4]).is_continue());
        let mut data = [0; 8];
        bus.read_mmio(VP, u64::MAX, &mut data);
        assert_eq!(data, [0xff; 8]);
        assert!(bus.write_mmio(VP, u64::MAX - 3, &[0; 8]).is_continue());
    }

    #[test]
    fn an_access_across_windows_is_taken_apart() {
        let (mut builder, low, high) = (builder(), probe(0x10), probe(0x20));
        builder.ports("low", 0x300, 2, low.clone()).unwrap();
        builder.ports("high", 0x302, 1, high.clone()).unwrap();
        let bus = builder.build();
        assert_eq!(read_io(&bus, 0x300, 4), [0x10, 0x11, 0x20, 0xff]);
        assert_eq!(read_io(&bus, 0x2ff, 2), [0xff, 0x10]);
        assert!(bus.write_io(VP, 0x301, &[1, 2, 3, 4]).is_continue());
        assert_eq!(low.lock().unwrap().written, [(1, vec![1])]);
        assert_eq!(high.lock().unwrap().written, [(0, vec![2])]);
    }

    #[test]
    fn a_power_request_comes_through() {
        let mut builder = builder();
        let power = Arc::new(Mutex::new(AcpiPower));
        builder.ports("acpi power", layout::ACPI_POWER_PORT, AcpiPower::PORTS, power).unwrap();
        let bus = builder.build();
        assert_eq!(bus.write_io(VP, 0x600, &[0x34]), ControlFlow::Break(PowerRequest::PowerOff));
        // Wider than the window: its third byte is the reset register.
        assert_eq!(bus.write_io(VP, 0x600, &[0, 0, 1, 0]), ControlFlow::Break(PowerRequest::Reset));
    }

    #[test]
    fn overlaps_are_refused_with_both_names() {
        let mut builder = builder();
        builder.ports("com1", 0x3f8, 8, probe(0)).unwrap();
        let error = builder.ports("probe", 0x3f0, 9, probe(0)).unwrap_err();
        let text = "ports 0x3f0..0x3f9 of probe overlap 0x3f8..0x400 of com1";
        assert_eq!(error.to_string(), text);
        builder.ports("below", 0x3f0, 8, probe(0)).unwrap();
        builder.ports("above", 0x400, 1, probe(0)).unwrap();
        let error = builder.mmio("probe", 0xfec0_0fff, 1, probe(0)).unwrap_err();
        let text = "addresses 0xfec00fff..0xfec01000 of probe overlap 0xfec00000..0xfec01000 of ioapic";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn what_is_no_window_is_refused() {
        let mut builder = builder();
        let error = builder.ports("probe", 0x300, 0, probe(0)).unwrap_err();
        assert_eq!(error.to_string(), "0x0 ports from 0x300 of probe are not a window");
        assert!(builder.ports("probe", 0xffff, 2, probe(0)).is_err());
        assert!(builder.mmio("probe", u64::MAX - 1, 3, probe(0)).is_err());
        builder.ports("last", 0xffff, 1, probe(0)).unwrap();
    }

    #[test]
    fn the_end_of_an_interrupt_reaches_the_ioapic() {
        let count = Count::default();
        let ioapic = Arc::new(Mutex::new(IoApic::new(Box::new(count.clone()))));
        let bus = BusBuilder::new(ioapic.clone()).build();
        for (register, value) in [(0x24u32, 0x8051u32), (0x25, 0)] {
            assert!(bus.write_mmio(VP, layout::IOAPIC, &register.to_le_bytes()).is_continue());
            assert!(bus.write_mmio(VP, layout::IOAPIC + 0x10, &value.to_le_bytes()).is_continue());
        }
        IrqLine::new(ioapic, 10).unwrap().set_level(true);
        bus.handle_eoi(0x51);
        assert_eq!(*count.0.lock().unwrap(), 2);
    }

    proptest! {
        /// A byte-by-byte search through all windows is the model.
        #[test]
        fn a_byte_is_found_where_it_was_put(
            windows in prop::collection::vec((0u16..0x80, 1u16..0x20), 0..12),
            port in 0u16..0x90, width in prop::sample::select(vec![1usize, 2, 4]),
        ) {
            let mut builder = builder();
            let mut model = [0xffu8; 0x100];
            for (number, (base, count)) in windows.into_iter().enumerate() {
                let mark = u8::try_from(number * 16).unwrap();
                let range = usize::from(base)..usize::from(base + count);
                let free = model[range.clone()].iter().all(|byte| *byte == 0xff);
                let device = Arc::new(Mutex::new(Ram(mark)));
                prop_assert_eq!(builder.ports("probe", base, count, device).is_ok(), free);
                if free {
                    model[range].fill(mark);
                }
            }
            let bus = builder.build();
            let at = usize::from(port);
            prop_assert_eq!(read_io(&bus, port, width), &model[at..at + width]);
        }
    }

    /// Reads as its mark everywhere.
    struct Ram(u8);

    impl IoDevice for Ram {
        fn read(&mut self, _: u64, data: &mut [u8]) {
            data.fill(self.0);
        }

        fn write(&mut self, _: u64, _: &[u8]) -> ControlFlow<PowerRequest> {
            ControlFlow::Continue(())
        }

        fn reset(&mut self) {}
    }
}
