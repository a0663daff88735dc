//! A partition's state.

use super::{narrow, present};
use crate::{Clock, IOAPIC_PINS, IrqRoutes, MsiRequest, PartitionState};
use guest_saved_state::processor::partition as message;
use save_restore::RestoreError;
use std::time::Duration;

const NANOSECONDS: u32 = 1_000_000_000;

impl From<&PartitionState> for message::PartitionState {
    fn from(state: &PartitionState) -> Self {
        let PartitionState { clock, irq_routes } = state;
        Self {
            clock: clock.as_ref().map(message::Clock::from),
            irq_routes: irq_routes.as_ref().map(message::IrqRoutes::from),
        }
    }
}

impl TryFrom<message::PartitionState> for PartitionState {
    type Error = RestoreError;

    fn try_from(state: message::PartitionState) -> Result<Self, RestoreError> {
        let message::PartitionState { clock, irq_routes } = state;
        Ok(Self {
            clock: clock.map(Clock::try_from).transpose()?,
            irq_routes: irq_routes.map(IrqRoutes::try_from).transpose()?,
        })
    }
}

impl From<&Clock> for message::Clock {
    fn from(clock: &Clock) -> Self {
        let Clock { elapsed, host_time } = clock;
        Self { elapsed: Some(time(*elapsed)), host_time: Some(time(*host_time)) }
    }
}

impl TryFrom<message::Clock> for Clock {
    type Error = RestoreError;

    fn try_from(clock: message::Clock) -> Result<Self, RestoreError> {
        let message::Clock { elapsed, host_time } = clock;
        Ok(Self {
            elapsed: duration("clock.elapsed", elapsed)?,
            host_time: duration("clock.host_time", host_time)?,
        })
    }
}

fn time(duration: Duration) -> message::Time {
    message::Time { seconds: duration.as_secs(), nanoseconds: duration.subsec_nanos() }
}

fn duration(field: &str, time: Option<message::Time>) -> Result<Duration, RestoreError> {
    let message::Time { seconds, nanoseconds } = present(field, time)?;
    match nanoseconds {
        ..NANOSECONDS => Ok(Duration::new(seconds, nanoseconds)),
        _ => Err(RestoreError::invalid(format!("{field}.nanoseconds"), nanoseconds)),
    }
}

impl From<&IrqRoutes> for message::IrqRoutes {
    fn from(IrqRoutes(routes): &IrqRoutes) -> Self {
        let routed = (0..).zip(routes).filter_map(|(pin, route)| {
            route.map(|MsiRequest { address, data }| message::IrqRoute { pin, address, data })
        });
        Self { routes: routed.collect() }
    }
}

impl TryFrom<message::IrqRoutes> for IrqRoutes {
    type Error = RestoreError;

    fn try_from(message::IrqRoutes { routes }: message::IrqRoutes) -> Result<Self, RestoreError> {
        const PIN: &str = "irq_routes.routes.pin";
        let mut all = [None; IOAPIC_PINS];
        for message::IrqRoute { pin, address, data } in routes {
            let route: Option<&mut Option<_>> = all.get_mut(narrow::<usize>(PIN, pin)?);
            let route = route.ok_or_else(|| RestoreError::invalid(PIN, pin))?;
            if route.replace(MsiRequest { address, data }).is_some() {
                return Err(RestoreError::invalid(PIN, format!("{pin} twice")));
            }
        }
        Ok(Self(all))
    }
}
