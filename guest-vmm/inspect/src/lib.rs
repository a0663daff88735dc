//! The inspection tree: what a component shows of itself, computed only when asked for.
//!
//! A component implements [`Inspect`] (or [`InspectMut`], if showing itself needs `&mut self`). Asked, it gets a
//! [`Request`] and answers it with one [`Value`], with named children through a [`Response`], or takes it away as a
//! [`Deferred`] that another task or thread answers later. A request carries a path and a depth, so that a child nobody
//! asked for is never computed: its closure is not called.
//!
//! Some of what a component holds may be none of the business of everybody who may look at the component. Such children
//! are marked as sensitive ([`Response::sensitive`]), and an inspection is started with the [`View`] of whoever asks.
//! Without sensitive parts, these are neither computed nor mentioned. The view travels with the request, also when that
//! is deferred: no component decides by whom it is seen.
//!
//! [`Inspection`] asks such a question from outside. [`Inspection::finish`] waits for the deferred parts up to one
//! deadline and gives the finished tree, a [`Node`]; parts that are late show as [`Node::Unanswered`], and delay
//! nothing but the end of their own inspection.
//!
//! Limits: nodes are read-only; a name is the path segment up to the next `/`, or any name that the path begins with.
//!
//! ```
//! use inspect::{Inspect, Inspection, Request, View};
//!
//! struct Timer { armed: bool, base: u64 }
//!
//! impl Inspect for Timer {
//!     fn inspect(&self, request: Request<'_>) {
//!         request.respond().field("armed", &self.armed).sensitive(|response| {
//!             response.hex("base", self.base);
//!         });
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let timer = Timer { armed: true, base: 0xfed0_0000 };
//! let ask = |view| Inspection::start("", 1, view, |request| timer.inspect(request));
//! let node = ask(View::Everything).finish(std::time::Duration::from_secs(1)).await;
//! assert_eq!(node.to_string(), "armed: true\nbase: 0xfed00000\n");
//! assert_eq!(node.to_json(), r#"{"armed":true,"base":4275044352}"#);
//!
//! let node = ask(View::WithoutSensitive).finish(std::time::Duration::from_secs(1)).await;
//! assert_eq!(node.to_string(), "armed: true\n");
//! # }
//! ```

mod implementations;
mod inspection;
mod node;
mod request;

pub use implementations::Hex;
pub use inspection::{Inspection, View};
pub use node::{Node, Value};
pub use request::{Deferred, Request, Response};

/// A component that can show itself through a shared reference.
///
/// `inspect` answers the request in exactly one way: [`Request::value`], [`Request::respond`] or [`Request::defer`].
/// A request that is dropped unanswered shows as [`Node::Unanswered`]. It must not block.
pub trait Inspect {
    /// Answers `request` with what this component shows of itself.
    fn inspect(&self, request: Request<'_>);
}

/// A component that needs `&mut self` to show itself. Every [`Inspect`] is one.
pub trait InspectMut {
    /// Answers `request` with what this component shows of itself; the contract of [`Inspect::inspect`] holds.
    fn inspect_mut(&mut self, request: Request<'_>);
}

impl<T: Inspect + ?Sized> InspectMut for T {
    fn inspect_mut(&mut self, request: Request<'_>) {
        self.inspect(request);
    }
}
