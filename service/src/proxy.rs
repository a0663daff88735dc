//! A GuestLifecycle for clients that cannot pass descriptors: the service holds the channel, and so the lease, for them.

use capnp_rpc::rpc_twoparty_capnp::Side;
use guest_schema::guest_capnp::guest_lifecycle as lifecycle;
use guest_transport::Connection;
use std::rc::Rc;
use tokio::task::{AbortHandle, spawn_local};

/// Forwards every call over a channel of its own. The last reference to it is the lease: its end closes the channel.
pub(crate) struct ProxiedLifecycle {
    inner: lifecycle::Client,
    channel: AbortHandle,
}

impl ProxiedLifecycle {
    /// A lifecycle over this channel.
    pub fn new(mut connection: Connection) -> Self {
        let inner = connection.bootstrap(Side::Server);
        let channel = spawn_local(async move {
            if let Err(error) = connection.run().await {
                tracing::warn!(%error, "a proxied guest's channel ended");
            }
        });
        Self { inner, channel: channel.abort_handle() }
    }
}

impl Drop for ProxiedLifecycle {
    fn drop(&mut self) {
        self.channel.abort();
    }
}

impl lifecycle::Server for ProxiedLifecycle {
    async fn create(
        self: Rc<Self>,
        params: lifecycle::CreateParams,
        mut results: lifecycle::CreateResults,
    ) -> capnp::Result<()> {
        let mut request = self.inner.create_request();
        request.set(params.get()?)?;
        results.set(request.send().promise.await?.get()?)
    }

    async fn bind(
        self: Rc<Self>,
        _: lifecycle::BindParams,
        mut results: lifecycle::BindResults,
    ) -> capnp::Result<()> {
        results.set(self.inner.bind_request().send().promise.await?.get()?)
    }

    async fn run(
        self: Rc<Self>,
        _: lifecycle::RunParams,
        mut results: lifecycle::RunResults,
    ) -> capnp::Result<()> {
        results.set(self.inner.run_request().send().promise.await?.get()?)
    }

    async fn stop(
        self: Rc<Self>,
        _: lifecycle::StopParams,
        mut results: lifecycle::StopResults,
    ) -> capnp::Result<()> {
        results.set(self.inner.stop_request().send().promise.await?.get()?)
    }

    async fn control(
        self: Rc<Self>,
        _: lifecycle::ControlParams,
        mut results: lifecycle::ControlResults,
    ) -> capnp::Result<()> {
        results.set(self.inner.control_request().send().promise.await?.get()?)
    }
}
