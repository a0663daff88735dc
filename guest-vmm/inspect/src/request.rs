//! One question on its way down the tree, and its answer being filled in.
//!
//! A request points to the slot that its answer goes into. While the path is not yet walked to its end, a response lets
//! only the matching child through, with the same slot; at the end of the path it gives each child a slot of its own.

use crate::{Inspect, InspectMut, Value, View};
use tokio::sync::oneshot;

/// A node that may still wait for its answer.
#[derive(Debug)]
pub(crate) enum Slot {
    Value(Value),
    Children(Vec<(String, Slot)>),
    Unevaluated,
    Unanswered,
    NotFound,
    Deferred(oneshot::Receiver<Slot>),
}

/// A question to one component: the rest of the path, how many levels of children to show below its end, and whether
/// whoever asks may see what is sensitive.
#[derive(Debug)]
#[must_use = "a request that is dropped shows as unanswered"]
pub struct Request<'a> {
    path: &'a str,
    depth: usize,
    view: View,
    slot: &'a mut Slot,
}

impl<'a> Request<'a> {
    pub(crate) fn new(path: &'a str, depth: usize, view: View, slot: &'a mut Slot) -> Self {
        *slot = Slot::Unanswered;
        Self { path: path.trim_matches('/'), depth, view, slot }
    }

    /// Answers with one value; if the path goes on below it, with "not found".
    pub fn value(self, value: impl Into<Value>) {
        *self.slot = if self.path.is_empty() { Slot::Value(value.into()) } else { Slot::NotFound };
    }

    /// Answers with children. Each child is computed only if the path and the depth lead to it.
    pub fn respond(self) -> Response<'a> {
        *self.slot = match (self.path, self.depth) {
            ("", 0) => Slot::Unevaluated,
            ("", _) => Slot::Children(Vec::new()),
            _ => Slot::NotFound,
        };
        Response { path: self.path, depth: self.depth, view: self.view, slot: self.slot, matched: false }
    }

    /// Takes the question away, to be answered by another task or thread. Dropped, it shows as unanswered.
    pub fn defer(self) -> Deferred {
        let (sender, receiver) = oneshot::channel();
        *self.slot = Slot::Deferred(receiver);
        Deferred { path: self.path.to_owned(), depth: self.depth, view: self.view, sender }
    }
}

/// The children of one node, being filled in.
#[derive(Debug)]
pub struct Response<'a> {
    path: &'a str,
    depth: usize,
    view: View,
    slot: &'a mut Slot,
    matched: bool,
}

impl Response<'_> {
    /// A child that shows itself.
    pub fn field(&mut self, name: &str, value: &(impl Inspect + ?Sized)) -> &mut Self {
        self.child(name, |request| value.inspect(request))
    }

    /// A child that needs `&mut` to show itself.
    pub fn field_mut(&mut self, name: &str, value: &mut (impl InspectMut + ?Sized)) -> &mut Self {
        self.child(name, |request| value.inspect_mut(request))
    }

    /// A leaf whose value is computed only if asked for.
    pub fn field_with<V: Into<Value>>(&mut self, name: &str, value: impl FnOnce() -> V) -> &mut Self {
        self.child(name, |request| request.value(value()))
    }

    /// A leaf with an unsigned integer, shown in hexadecimal.
    pub fn hex(&mut self, name: &str, value: impl Into<u64>) -> &mut Self {
        self.child(name, |request| request.value(Value::Hex(value.into())))
    }

    /// A leaf with text made by `Display`.
    pub fn display(&mut self, name: &str, value: &(impl std::fmt::Display + ?Sized)) -> &mut Self {
        self.child(name, |request| request.value(value.to_string()))
    }

    /// A child that `answer` answers for; `answer` is called only if the child is asked for.
    pub fn child(&mut self, name: &str, answer: impl FnOnce(Request<'_>)) -> &mut Self {
        if !self.path.is_empty() {
            self.walk(name, answer);
        } else if let Slot::Children(children) = &mut *self.slot {
            let mut slot = Slot::Unanswered;
            answer(Request::new("", self.depth - 1, self.view, &mut slot));
            children.push((name.to_owned(), slot));
        }
        self
    }

    /// Children that are sensitive: `answer` adds them, and is called only if whoever asks may see them. For everybody
    /// else they do not exist: they are absent, and a path to one of them leads nowhere.
    pub fn sensitive(&mut self, answer: impl FnOnce(&mut Self)) -> &mut Self {
        match self.view {
            View::Everything => answer(self),
            View::WithoutSensitive => {}
        }
        self
    }

    /// Lets the request through to the child that the path names; the first of that name answers.
    fn walk(&mut self, name: &str, answer: impl FnOnce(Request<'_>)) {
        let Some(rest) = self.path.strip_prefix(name) else { return };
        if !self.matched && (rest.is_empty() || rest.starts_with('/')) {
            self.matched = true;
            answer(Request::new(rest, self.depth, self.view, self.slot));
        }
    }
}

/// A question taken away from the tree, to be answered by another task or thread.
///
/// Dropped, it shows as unanswered. An answer after the inspection has ended is discarded.
#[derive(Debug)]
#[must_use = "a deferred request that is dropped shows as unanswered"]
pub struct Deferred {
    path: String,
    depth: usize,
    view: View,
    sender: oneshot::Sender<Slot>,
}

impl Deferred {
    /// Whether the inspection still waits for the answer. Once it does not, it never will again.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        !self.sender.is_closed()
    }

    /// Lets `component` answer.
    pub fn inspect(self, component: &(impl Inspect + ?Sized)) {
        self.answer(|request| component.inspect(request));
    }

    /// Lets `component` answer, which needs `&mut` for it.
    pub fn inspect_mut(self, component: &mut (impl InspectMut + ?Sized)) {
        self.answer(|request| component.inspect_mut(request));
    }

    /// Lets a closure answer. It is not called if nobody waits for the answer any more.
    pub fn answer(self, answer: impl FnOnce(Request<'_>)) {
        if !self.is_awaited() {
            return;
        }
        let mut slot = Slot::Unanswered;
        answer(Request::new(&self.path, self.depth, self.view, &mut slot));
        // The receiver may be gone by now: its deadline has passed.
        let _ = self.sender.send(slot);
    }
}
