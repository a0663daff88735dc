//! Observer: looks, and changes nothing.

use crate::events::MAX_SUBSCRIPTIONS;
use crate::guest::Guest;
use guest_schema::guest_capnp::{Rendering, observer, subscription};
use guest_schema::{Failure, GuestError, Transition, UnitStatus};
use guest_transport::broken;
use inspect::View;
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

    async fn timeline(
        self: Rc<Self>,
        _: observer::TimelineParams,
        mut results: observer::TimelineResults,
    ) -> capnp::Result<()> {
        Transition::write_all(&self.0.timeline(), |count| results.get().init_transitions(count));
        Ok(())
    }

    async fn inspect(
        self: Rc<Self>,
        params: observer::InspectParams,
        mut results: observer::InspectResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let (path, depth, rendering) =
            (params.get_path()?.to_str()?, params.get_depth(), params.get_rendering()?);
        match inspected(&self.0, path, depth, rendering, View::WithoutSensitive).await {
            Ok(tree) => results.get().set_tree(&tree[..]),
            Err(failure) => failure.write(results.get().init_error()),
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

/// A node of the guest's inspection tree, rendered.
pub(super) async fn inspected(
    guest: &Guest,
    path: &str,
    depth: u32,
    rendering: Rendering,
    view: View,
) -> Result<String, Failure> {
    let node = guest.inspect(path, depth, view).await?;
    Ok(match rendering {
        Rendering::Json => node.to_json(),
        Rendering::Text => node.to_string(),
    })
}

/// A subscriber that is being fed.
struct Fed(AbortHandle);

impl subscription::Server for Fed {}

impl Drop for Fed {
    fn drop(&mut self) {
        self.0.abort();
    }
}
