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
//! A node may be writable ([`Response::writable`]). An [`Update`] takes a text to the node at its path, the same way that a
//! question goes, and also when that is deferred. The node's type reads the text ([`FromText`]), the component takes the
//! value or refuses it, and the answer is the node's value after it or an [`UpdateError`]. There is no update without the
//! sight of everything. Renderings do not mark a writable node: its text is its value alone, as an update takes it back.
//!
//! Limits: an update is of one node; a name is the path segment up to the next `/`, or any name that the path begins with.
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
//!
//! A writable node, and what becomes of updates:
//!
//! ```
//! use inspect::{InspectMut, Request, Update, UpdateError, Value};
//!
//! struct Port { open: bool, queue: u16 }
//!
//! impl InspectMut for Port {
//!     fn inspect_mut(&mut self, request: Request<'_>) {
//!         let queue = self.queue;
//!         request.respond().field("open", &self.open).writable("queue", || queue, |new| {
//!             if new == 0 {
//!                 return Err("a port needs a queue");
//!             }
//!             self.queue = new;
//!             Ok(new)
//!         });
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let mut port = Port { open: true, queue: 16 };
//! let mut update = async |path, text| {
//!     let update = Update::start(path, text, |request| port.inspect_mut(request));
//!     update.finish(std::time::Duration::from_secs(1)).await
//! };
//! assert_eq!(update("queue", "64").await, Ok(Value::Unsigned(64)));
//! let refusal = |error: Result<Value, UpdateError>| error.unwrap_err().to_string();
//! assert_eq!(refusal(update("queue", "0").await), "refused: a port needs a queue");
//! assert_eq!(refusal(update("queue", "-1").await), "\"-1\" is not a whole number from 0 to 65535");
//! assert_eq!(refusal(update("open", "false").await), "the node is not writable");
//! assert_eq!(port.queue, 64);
//! # }
//! ```

mod implementations;
mod inspection;
mod node;
mod request;
mod text;
mod update;

pub use implementations::Hex;
pub use inspection::{Inspection, View};
pub use node::{Node, Value};
pub use request::{Deferred, Request, Response};
pub use text::FromText;
pub use update::{Update, UpdateError};

/// A component that can show itself through a shared reference.
///
/// `inspect` answers the request in exactly one way: [`Request::value`], [`Request::writable`], [`Request::respond`] or
/// [`Request::defer`]. A request that is dropped unanswered shows as [`Node::Unanswered`]. It must not block. The same method answers updates;
/// nothing but a writable node can tell.
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
