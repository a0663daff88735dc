//! Which interrupts' ends the local APICs report, and what irqfds send.
//!
//! With a split irqchip KVM reports the end of an interrupt (KVM_EXIT_IOAPIC_EOI) if its table routes one of the IOAPIC's
//! pins to it, level-triggered. A pin with an irqfd sends what the table says. All other interrupts are sent as messages and need no route. Telling KVM a table
//! waits until nobody reads the old one: 10 to 20 µs on an idle host, 1 to 8 ms on a busy one (both measured). So it is done
//! as seldom as can be: for any change of a pin with an irqfd, and for a new level-triggered route. One of these that is gone stays in KVM's table until the next time, since an end too many does no harm: the IOAPIC knows its pins.

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry};
use processor::{IOAPIC_PINS, IrqRoutes, MsiRequest};

/// The routes there are and those that KVM knows.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    all: IrqRoutes,
    known: Table,
    /// The pins with an irqfd: bit n is pin n.
    irqfds: u128,
}

/// Those that KVM has to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Table(IrqRoutes);

impl Routes {
    /// Sets what a pin sends. False if there is no such pin.
    pub(crate) fn set(&mut self, pin: u8, request: Option<MsiRequest>) -> bool {
        let Some(route) = self.all.0.get_mut(usize::from(pin)) else { return false };
        *route = request;
        true
    }

    /// The pin has an irqfd. False if there is no such pin.
    pub(crate) fn set_irqfd(&mut self, pin: u8) -> bool {
        let is_pin = usize::from(pin) < IOAPIC_PINS;
        if is_pin {
            self.irqfds |= 1 << pin;
        }
        is_pin
    }

    /// What every pin sends.
    pub(crate) fn all(&self) -> IrqRoutes {
        self.all
    }

    /// Sets what every pin sends.
    pub(crate) fn set_all(&mut self, routes: &IrqRoutes) {
        self.all = *routes;
    }

    /// The table to tell KVM, if the one it knows lacks a route.
    pub(crate) fn needed(&self) -> Option<Table> {
        let has_irqfd = |pin: usize| self.irqfds >> pin & 1 == 1;
        let mut wanted = IrqRoutes::default();
        for (pin, (wanted, route)) in wanted.0.iter_mut().zip(self.all.0).enumerate() {
            *wanted = route.filter(|route| has_irqfd(pin) || route.level_triggered());
        }
        let mut pairs = wanted.0.iter().zip(&self.known.0.0).enumerate();
        let known = |(pin, (wanted, known)): (_, (&Option<MsiRequest>, _))| {
            wanted == known || wanted.is_none() && !has_irqfd(pin)
        };
        let enough = pairs.all(known);
        (!enough).then_some(Table(wanted))
    }

    /// KVM knows this table now.
    pub(crate) fn told(&mut self, table: Table) {
        self.known = table;
    }
}

impl Table {
    /// The table as KVM takes it.
    pub(crate) fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        (0..).zip(&self.0.0).filter_map(|(pin, route)| route.map(|route| entry(pin, route))).collect()
    }
}

fn entry(gsi: u32, route: MsiRequest) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    let half = |value: u64| u32::try_from(value & u64::from(u32::MAX)).expect("masked");
    entry.u.msi.address_lo = half(route.address);
    entry.u.msi.address_hi = half(route.address >> 32);
    entry.u.msi.data = route.data;
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEVEL: MsiRequest = MsiRequest { address: 0xfee0_0000, data: 0x8030 };
    const EDGE: MsiRequest = MsiRequest { address: 0xfee0_0000, data: 0x0031 };

    fn tell(routes: &mut Routes) -> Option<usize> {
        let table = routes.needed()?;
        routes.told(table);
        Some(table.entries().len())
    }

    #[test]
    fn kvm_is_told_of_new_level_triggered_routes_only() {
        let mut routes = Routes::default();
        assert!(routes.set(3, Some(EDGE)));
        assert_eq!(tell(&mut routes), None);
        assert!(routes.set(9, Some(LEVEL)));
        assert_eq!(tell(&mut routes), Some(1));
        assert!(routes.set(9, None));
        assert_eq!(tell(&mut routes), None, "a masked pin");
        assert!(routes.set(9, Some(LEVEL)));
        assert_eq!(tell(&mut routes), None, "unmasked as it was");
        assert!(routes.set(23, Some(MsiRequest { data: 0x8040, ..LEVEL })));
        assert_eq!(tell(&mut routes), Some(2));
        assert!(routes.set(9, Some(MsiRequest { address: 0xfee0_1000, ..LEVEL })));
        assert_eq!(tell(&mut routes), Some(2), "another destination");
        let edge = routes.all();
        assert_eq!(edge.0[3], Some(EDGE), "what KVM need not know is there all the same");
        routes.set_all(&IrqRoutes::default());
        assert_eq!(tell(&mut routes), None);
        assert!(!routes.set(96, Some(LEVEL)));
    }

    #[test]
    fn kvm_is_told_of_every_change_of_a_pin_with_an_irqfd() {
        let mut routes = Routes::default();
        assert!(routes.set_irqfd(40));
        assert_eq!(tell(&mut routes), None, "it sends nothing yet");
        assert!(routes.set(40, Some(EDGE)));
        assert_eq!(tell(&mut routes), Some(1));
        assert!(routes.set(41, Some(EDGE)));
        assert_eq!(tell(&mut routes), None, "another pin");
        assert!(routes.set(40, None));
        assert_eq!(tell(&mut routes), Some(0), "masked, it must not send");
        assert!(!routes.set_irqfd(96));
    }
}
