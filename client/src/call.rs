//! A request that is on its way.

use crate::ClientError;
use capnp::capability::{Request, Response};
use capnp::traits::{Owned, Pipelined};
use futures::FutureExt;
use futures::future::{LocalBoxFuture, Shared};
use guest_schema::Failure;
use std::pin::Pin;
use std::task::{Context, Poll};

/// The answer of a request that has been sent already.
///
/// Awaiting it sends nothing more; it may be awaited late. Dropping it tells the peer that nobody waits: what the request has
/// begun by then goes on, but a request that has not begun may be dropped with it. So hold on to what must happen.
#[must_use = "a call that is dropped before its answer may never take effect"]
pub struct Call<T>(LocalBoxFuture<'static, Result<T, ClientError>>);

impl<T> Future for Call<T> {
    type Output = Result<T, ClientError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_unpin(cx)
    }
}

/// An answer that several wait for.
pub(crate) type SharedCall<T> = Shared<Call<T>>;

/// What the answer of a method holds: exceptions are for messages that break the schema.
pub(crate) type Read<T> = capnp::Result<Result<T, Failure>>;

impl<T: 'static> Call<T> {
    /// A call around the rest of its work. The request must have been sent.
    pub(crate) fn around(work: impl Future<Output = Result<T, ClientError>> + 'static) -> Self {
        Self(work.boxed_local())
    }

    /// Sends the request now; `read` takes the answer out of the response. `held` is kept until then.
    pub(crate) fn send<P: Owned, R>(
        request: Request<P, R>,
        held: impl Sized + 'static,
        read: impl FnOnce(R::Reader<'_>) -> Read<T> + 'static,
    ) -> Self
    where
        R: Pipelined + Owned + Unpin + 'static,
        R::Pipeline: capnp::capability::FromTypelessPipeline,
    {
        Self::answer(request.send().promise, held, read)
    }

    /// The answer that this promise brings.
    pub(crate) fn answer<R: Pipelined + Owned + 'static>(
        promise: capnp::capability::Promise<Response<R>, capnp::Error>,
        held: impl Sized + 'static,
        read: impl FnOnce(R::Reader<'_>) -> Read<T> + 'static,
    ) -> Self {
        Self::around(async move {
            let response = promise.await?;
            let answer = read(response.get()?)?;
            drop(held);
            Ok(answer?)
        })
    }
}

/// The failure beside a capability, which is null after success.
pub(crate) fn failure_beside(
    refused: bool,
    failure: capnp::Result<guest_schema::common_capnp::failure::Reader<'_>>,
) -> Read<()> {
    if refused { Ok(Err(Failure::read(failure?)?)) } else { Ok(Ok(())) }
}
