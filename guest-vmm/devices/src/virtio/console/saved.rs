//! A console saved and restored.

use super::ConsoleSize;
use super::control::{Notice, Notices};
use super::port::{Port, PortState};
use super::shared::Shared;
use crate::INPUT_CAPACITY;
use crate::saved::{invalid, register};
use guest_saved_state::devices::console::{ConsolePortState, ConsoleState};
use save_restore::RestoreError;

impl Shared {
    pub fn save(&self) -> ConsoleState {
        let ConsoleSize { columns, rows } = self.size();
        let ports = self.ports().iter().map(|port| save_port(port)).collect();
        ConsoleState { columns: columns.into(), rows: rows.into(), ports }
    }

    pub fn restore(&self, state: ConsoleState) -> Result<(), RestoreError> {
        let ConsoleState { columns, rows, ports } = state;
        let columns = register("columns", columns, u16::MAX.into())?;
        let rows = register("rows", rows, u16::MAX.into())?;
        if ports.len() != self.ports().len() {
            return Err(RestoreError::invalid("ports", format_args!("{} ports long", ports.len())));
        }
        let pairs = self.ports().iter().zip(ports).enumerate();
        let several = self.has_further_ports();
        let checked = pairs.map(|(index, (port, saved))| checked_port(index, port, several, saved));
        let checked: Vec<PortState> = checked.collect::<Result<_, _>>()?;
        self.set_size(ConsoleSize { columns, rows });
        for (port, state) in self.ports().iter().zip(checked) {
            port.replace(state);
        }
        Ok(())
    }
}

fn save_port(port: &Port) -> ConsolePortState {
    let state = port.state();
    ConsolePortState {
        name: port.name().unwrap_or_default().to_owned(),
        ready: state.ready,
        open: state.open,
        notices: state.notices.bits(),
        queued_input: state.queue.iter().copied().collect(),
    }
}

/// A port's state, as the port can have it: what only control messages bring about needs them.
fn checked_port(
    index: usize,
    port: &Port,
    several: bool,
    saved: ConsolePortState,
) -> Result<PortState, RestoreError> {
    let ConsolePortState { name, ready, open, notices, queued_input } = saved;
    let field = |name: &str| format!("ports[{index}].{name}");
    if name != port.name().unwrap_or_default() {
        return Err(RestoreError::invalid(field("name"), format_args!("{name:?}")));
    }
    if ready && !several {
        return Err(RestoreError::invalid(field("ready"), ready));
    }
    if open && !ready {
        return Err(RestoreError::invalid(field("open"), open));
    }
    let possible = |notice| several && port.can_have(notice) && (ready || notice == Notice::Add);
    let notices = Notices::from_bits(notices, possible).ok_or_else(|| invalid(&field("notices"), notices))?;
    if queued_input.len() > INPUT_CAPACITY {
        let length = format_args!("{} bytes long", queued_input.len());
        return Err(RestoreError::invalid(field("queued_input"), length));
    }
    Ok(PortState { queue: queued_input.into(), ready, open, notices, ..PortState::default() })
}
