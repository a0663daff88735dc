//! Observer: looks, and changes nothing.

use crate::events::MAX_SUBSCRIPTIONS;
use crate::guest::Guest;
use guest_schema::guest_capnp::{observer, subscription};
use guest_schema::{Failure, GuestError, UnitStatus};
use guest_transport::broken;
use std::rc::Rc;
use tokio::task::{AbortHandle, spawn_local};

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
    async fn subscribe(
        self: Rc<Self>,
        params: observer::SubscribeParams,
        mut results: observer::SubscribeResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let sink = params.get_sink()?;
        match self.0.events().subscribe(params.get_from_sequence()) {
            Some(place) => {
                let fed = Fed(spawn_local(place.feed(sink)).abort_handle());
                let subscription: subscription::Client = capnp_rpc::new_client(fed);
                results.get().set_subscription(subscription);
            }
            None => {
                let detail = format!("the guest has {MAX_SUBSCRIPTIONS} subscriptions already");
                let failure = Failure::new(GuestError::LimitExceeded, detail);
                let mut results = results.get();
                results.set_subscription(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }

    async fn unit_graph(
        self: Rc<Self>,
        _: observer::UnitGraphParams,
        mut results: observer::UnitGraphResults,
    ) -> capnp::Result<()> {
        UnitStatus::write_all(&self.0.units(), |count| results.get().init_units(count));
        Ok(())
    }
}

/// A subscriber that is being fed.
struct Fed(AbortHandle);

impl subscription::Server for Fed {}

impl Drop for Fed {
    fn drop(&mut self) {
        self.0.abort();
    }
}
