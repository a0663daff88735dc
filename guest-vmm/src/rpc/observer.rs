//! Observer: looks, and changes nothing.

use crate::guest::Guest;
use guest_schema::guest_capnp::observer;
use std::rc::Rc;

/// A guest, observed.
pub(crate) struct Observed(Rc<Guest>);

impl Observed {
    pub fn new(guest: Rc<Guest>) -> Self {
        Self(guest)
    }
}

impl observer::Server for Observed {
    async fn state(
        self: Rc<Self>,
        _: observer::StateParams,
        mut results: observer::StateResults,
    ) -> capnp::Result<()> {
        self.0.state().await.write(results.get().init_state());
        Ok(())
    }

    async fn when_terminated(
        self: Rc<Self>,
        _: observer::WhenTerminatedParams,
        mut results: observer::WhenTerminatedResults,
    ) -> capnp::Result<()> {
        self.0.exit().await.write(results.get().init_exit());
        Ok(())
    }
}
