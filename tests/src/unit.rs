//! A state unit of the client's, which notes what it is asked.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use guest_client::UnitConfig;
use guest_schema::config_capnp::state_unit as served;
use guest_schema::{Failure, GuestError};

/// A unit, and what it was asked so far. Clones are the same unit.
#[derive(Clone, Default)]
pub struct NotingUnit {
    notes: Rc<RefCell<Vec<String>>>,
    refuses: Rc<Cell<Option<&'static str>>>,
}

impl NotingUnit {
    /// As a part of a guest, under this name; both its name and what it is asked go into the notes of this unit.
    pub fn part(&self, id: &'static str) -> UnitConfig {
        UnitConfig::new(id, capnp_rpc::new_client(Part { id, unit: self.clone() }))
    }

    /// From now on it refuses this operation.
    pub fn refuse(&self, operation: &'static str) {
        self.refuses.set(Some(operation));
    }

    /// What was asked since the last look, "ID OPERATION" each.
    pub fn take_notes(&self) -> Vec<String> {
        self.notes.take()
    }
}

struct Part {
    id: &'static str,
    unit: NotingUnit,
}

impl Part {
    fn asked(&self, operation: &'static str) -> Result<(), Failure> {
        self.unit.notes.borrow_mut().push(format!("{} {operation}", self.id));
        if self.unit.refuses.get() == Some(operation) {
            return Err(Failure::new(
                GuestError::InternalError,
                format!("{} does not {operation} today", self.id),
            ));
        }
        Ok(())
    }
}

impl served::Server for Part {
    async fn start(
        self: Rc<Self>,
        _: served::StartParams,
        mut results: served::StartResults,
    ) -> capnp::Result<()> {
        Failure::write_result(&self.asked("start"), results.get().init_result());
        Ok(())
    }

    async fn stop(
        self: Rc<Self>,
        _: served::StopParams,
        mut results: served::StopResults,
    ) -> capnp::Result<()> {
        Failure::write_result(&self.asked("stop"), results.get().init_result());
        Ok(())
    }

    async fn reset(
        self: Rc<Self>,
        _: served::ResetParams,
        mut results: served::ResetResults,
    ) -> capnp::Result<()> {
        Failure::write_result(&self.asked("reset"), results.get().init_result());
        Ok(())
    }

    async fn inspect(
        self: Rc<Self>,
        _: served::InspectParams,
        mut results: served::InspectResults,
    ) -> capnp::Result<()> {
        results.get().set_json(&format!(r#"{{"id":"{}"}}"#, self.id)[..]);
        Ok(())
    }
}
