//! Property tests: whatever a guest reads and writes, in any width and at any offset, no device panics, and every read fills the
//! data that it was given.

use crate::ioapic::tests::ioapic;
use crate::{
    Absent, AcpiPower, DebugExit, Device, GenericEventDevice, GuestPanic, I8042, IoDevice, IrqLine, Pvpanic,
    Rtc, SerialPort, SystemClock,
};
use proptest::prelude::*;
use std::sync::Arc;

#[derive(Debug, Clone)]
enum Access {
    Read { offset: u64, width: usize },
    Write { offset: u64, data: Vec<u8> },
    Reset,
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![8 => 0u64..0x50, 1 => any::<u64>().prop_map(|o| o % (u64::MAX - 8))];
    let width = prop::sample::select(vec![1usize, 2, 4, 8]);
    prop_oneof![
        8 => (offset.clone(), width.clone()).prop_map(|(offset, width)| Access::Read { offset, width }),
        16 => (offset, width, any::<[u8; 8]>())
            .prop_map(|(offset, width, data)| Access::Write { offset, data: data[..width].to_vec() }),
        1 => Just(Access::Reset),
    ]
}

fn devices() -> Vec<Box<dyn IoDevice>> {
    let (ioapic, _) = ioapic();
    let line = IrqLine::new(ioapic.clone(), 4).expect("pin 4");
    let mut serial = SerialPort::new(line, Arc::new(|_: &[u8]| ()));
    serial.start();
    let line = IrqLine::new(ioapic, 9).expect("pin 9");
    vec![
        Box::new(serial),
        Box::new(Rtc::new(Box::new(SystemClock))),
        Box::new(I8042::new()),
        Box::new(AcpiPower),
        Box::new(GenericEventDevice::new(line)),
        Box::new(Pvpanic::new(Arc::new(|_: GuestPanic| ()))),
        Box::new(DebugExit),
        Box::new(Absent),
    ]
}

fn apply(device: &mut dyn IoDevice, access: &Access) -> Result<(), TestCaseError> {
    match access {
        Access::Read { offset, width } => {
            // What a read leaves alone differs between two different fills.
            let fills = [0x55u8, 0xaa].map(|fill| {
                let mut data = vec![fill; *width];
                device.read(*offset, &mut data);
                data
            });
            let untouched = |at: usize| fills[0][at] == 0x55 && fills[1][at] == 0xaa;
            prop_assert!(!(0..*width).any(untouched), "a read left bytes alone");
        }
        Access::Write { offset, data } => drop(device.write(*offset, data)),
        Access::Reset => device.reset(),
    }
    Ok(())
}

proptest! {
    #[test]
    fn no_access_panics(accesses in prop::collection::vec(access(), 1..200)) {
        for mut device in devices() {
            for access in &accesses {
                apply(&mut *device, access)?;
            }
        }
        let (ioapic, _) = ioapic();
        let line = IrqLine::new(ioapic.clone(), 16).expect("pin 16");
        for (count, access) in accesses.iter().enumerate() {
            apply(&mut *ioapic.lock().expect("no test panics"), access)?;
            line.set_level(count % 3 == 0);
        }
    }
}
