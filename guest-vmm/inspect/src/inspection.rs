//! The question asked from outside, and the wait for its deferred parts.

use crate::request::Slot;
use crate::{Node, Request};
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// How much of the tree an inspection may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum View {
    /// All of it.
    Everything,
    /// Only what its components have not marked as sensitive ([`Response::sensitive`](crate::Response::sensitive)).
    WithoutSensitive,
}

/// An inspection under way: the parts that could be computed at once, and the deferred ones still to come.
#[derive(Debug)]
#[must_use = "finish() gives the tree"]
pub struct Inspection {
    slot: Slot,
}

impl Inspection {
    /// Asks `component` for what is at `path` (segments joined by `/`, empty for the component itself), with `depth`
    /// levels of children below it, as far as `view` allows.
    pub fn start(path: &str, depth: usize, view: View, component: impl FnOnce(Request<'_>)) -> Self {
        let mut slot = Slot::Unanswered;
        component(Request::look(path, depth, view, &mut slot));
        Self { slot }
    }

    /// Waits for the deferred parts until all are answered or `patience` is over, and gives the tree.
    ///
    /// Has to be awaited in a `tokio` runtime with time enabled.
    pub async fn finish(self, patience: Duration) -> Node {
        resolve(self.slot, Instant::now() + patience).await
    }
}

/// Deferred parts are awaited one after the other: whoever answers them does so meanwhile, and all share one deadline,
/// so that the order of waiting changes neither the answers nor the end.
fn resolve(slot: Slot, deadline: Instant) -> Pin<Box<dyn Future<Output = Node> + Send>> {
    Box::pin(async move {
        match slot {
            Slot::Value(value) => Node::Value(value),
            Slot::Children(children) => resolve_children(children, deadline).await,
            Slot::Unevaluated => Node::Unevaluated,
            Slot::Unanswered => Node::Unanswered,
            Slot::NotFound => Node::NotFound,
            Slot::Deferred(answer) => match timeout_at(deadline, answer).await {
                Ok(Ok(slot)) => resolve(slot, deadline).await,
                _ => Node::Unanswered,
            },
        }
    })
}

async fn resolve_children(children: Vec<(String, Slot)>, deadline: Instant) -> Node {
    let mut nodes = Vec::with_capacity(children.len());
    for (name, slot) in children {
        let node = match slot {
            // A leaf needs no wait, and no allocation for one.
            Slot::Value(value) => Node::Value(value),
            slot => resolve(slot, deadline).await,
        };
        nodes.push((name, node));
    }
    Node::Children(nodes)
}
