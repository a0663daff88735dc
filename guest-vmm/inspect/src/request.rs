//! One question on its way down the tree, and its answer being filled in.
//!
//! A request points to the slot that its answer goes into. While the path is not yet walked to its end, a response lets
//! only the matching child through, with the same slot; at the end of the path it gives each child a slot of its own.
//!
//! A look and an update are walked alike and answered apart: a look fills a slot with what is shown, an update, which is for
//! one node and has neither depth nor view, an outcome. So nothing but [`Request::writable`] can make an update succeed.

use crate::update::{Outcome, written};
use crate::{FromText, Inspect, InspectMut, UpdateError, Value, View};
use std::fmt::Display;
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

/// What is asked of the node at the end of the path, and where the answer goes.
#[derive(Debug)]
enum Question<'a> {
    /// To show itself, with so many levels of children, to somebody who may see so much.
    Look { depth: usize, view: View, slot: &'a mut Slot },
    /// To take the value that this text stands for.
    Update { text: &'a str, outcome: &'a mut Outcome },
}

/// A question to one component: the rest of the path, and either how many levels of children to show below its end and
/// whether whoever asks may see what is sensitive, or the new value of the node there.
#[derive(Debug)]
#[must_use = "a request that is dropped shows as unanswered"]
pub struct Request<'a> {
    path: &'a str,
    question: Question<'a>,
}

impl<'a> Request<'a> {
    pub(crate) fn look(path: &'a str, depth: usize, view: View, slot: &'a mut Slot) -> Self {
        *slot = Slot::Unanswered;
        Self { path: path.trim_matches('/'), question: Question::Look { depth, view, slot } }
    }

    pub(crate) fn update(path: &'a str, text: &'a str, outcome: &'a mut Outcome) -> Self {
        *outcome = Err(UpdateError::Unanswered).into();
        Self { path: path.trim_matches('/'), question: Question::Update { text, outcome } }
    }

    /// Answers with one value; if the path goes on below it, with "not found". An update is refused.
    pub fn value(self, value: impl Into<Value>) {
        match self.question {
            Question::Look { slot, .. } if self.path.is_empty() => *slot = Slot::Value(value.into()),
            Question::Look { slot, .. } => *slot = Slot::NotFound,
            Question::Update { outcome, .. } => *outcome = Err(read_only(self.path)).into(),
        }
    }

    /// Answers with one value that an update can replace.
    ///
    /// A look calls `value` and never `write`. An update calls `write`, and only with text that stands for a `T`; it sets the
    /// new value, or something of it, and gives the value after that, or the reason why it is refused. If the path goes on
    /// below the value, neither is of use, and the answer is "not found".
    pub fn writable<T: FromText, E: Display>(
        self,
        value: impl FnOnce() -> T,
        write: impl FnOnce(T) -> Result<T, E>,
    ) {
        match self.question {
            Question::Update { text, outcome } if self.path.is_empty() => {
                *outcome = written(text, write).into();
            }
            Question::Update { outcome, .. } => *outcome = Err(read_only(self.path)).into(),
            Question::Look { .. } => self.value(value()),
        }
    }

    /// Answers with children. Each child is computed only if the path and the depth lead to it.
    pub fn respond(self) -> Response<'a> {
        let Self { path, mut question } = self;
        match &mut question {
            Question::Look { depth, slot, .. } => {
                **slot = match (path, *depth) {
                    ("", 0) => Slot::Unevaluated,
                    ("", _) => Slot::Children(Vec::new()),
                    _ => Slot::NotFound,
                }
            }
            Question::Update { outcome, .. } => **outcome = Err(read_only(path)).into(),
        }
        Response { path, question, matched: false }
    }

    /// Takes the question away, to be answered by another task or thread. Dropped, it shows as unanswered.
    pub fn defer(self) -> Deferred {
        let question = match self.question {
            Question::Look { depth, view, slot } => {
                let (sender, receiver) = oneshot::channel();
                *slot = Slot::Deferred(receiver);
                TakenQuestion::Look { depth, view, sender }
            }
            Question::Update { text, outcome } => {
                let (sender, receiver) = oneshot::channel();
                *outcome = Outcome::Deferred(receiver);
                TakenQuestion::Update { text: text.to_owned(), sender }
            }
        };
        Deferred { path: self.path.to_owned(), question }
    }
}

/// Why an update fails at a node that takes none, with so much of the path left.
fn read_only(rest: &str) -> UpdateError {
    if rest.is_empty() { UpdateError::NotWritable } else { UpdateError::NotFound }
}

/// The children of one node, being filled in.
#[derive(Debug)]
pub struct Response<'a> {
    path: &'a str,
    question: Question<'a>,
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

    /// A leaf that an update can replace; see [`Request::writable`].
    pub fn writable<T: FromText, E: Display>(
        &mut self,
        name: &str,
        value: impl FnOnce() -> T,
        write: impl FnOnce(T) -> Result<T, E>,
    ) -> &mut Self {
        self.child(name, |request| request.writable(value, write))
    }

    /// A leaf with an unsigned integer, shown in hexadecimal.
    pub fn hex(&mut self, name: &str, value: impl Into<u64>) -> &mut Self {
        self.child(name, |request| request.value(Value::Hex(value.into())))
    }

    /// A leaf with text made by `Display`.
    pub fn display(&mut self, name: &str, value: &(impl Display + ?Sized)) -> &mut Self {
        self.child(name, |request| request.value(value.to_string()))
    }

    /// A child that `answer` answers for; `answer` is called only if the child is asked for.
    pub fn child(&mut self, name: &str, answer: impl FnOnce(Request<'_>)) -> &mut Self {
        if !self.path.is_empty() {
            self.walk(name, answer);
        } else if let Question::Look { depth, view, slot: Slot::Children(children) } = &mut self.question {
            let mut slot = Slot::Unanswered;
            answer(Request::look("", *depth - 1, *view, &mut slot));
            children.push((name.to_owned(), slot));
        }
        self
    }

    /// Children that are sensitive: `answer` adds them, and is called only if whoever asks may see them. For everybody
    /// else they do not exist: they are absent, and a path to one of them leads nowhere. Whoever updates may see them all.
    pub fn sensitive(&mut self, answer: impl FnOnce(&mut Self)) -> &mut Self {
        match self.question {
            Question::Look { view: View::WithoutSensitive, .. } => {}
            Question::Look { view: View::Everything, .. } | Question::Update { .. } => answer(self),
        }
        self
    }

    /// Lets the request through to the child that the path names; the first of that name answers.
    fn walk(&mut self, name: &str, answer: impl FnOnce(Request<'_>)) {
        let Some(rest) = self.path.strip_prefix(name) else { return };
        if self.matched || !(rest.is_empty() || rest.starts_with('/')) {
            return;
        }
        self.matched = true;
        answer(match &mut self.question {
            Question::Look { depth, view, slot } => Request::look(rest, *depth, *view, slot),
            Question::Update { text, outcome } => Request::update(rest, text, outcome),
        });
    }
}

#[derive(Debug)]
enum TakenQuestion {
    Look { depth: usize, view: View, sender: oneshot::Sender<Slot> },
    Update { text: String, sender: oneshot::Sender<Outcome> },
}

/// A question taken away from the tree, to be answered by another task or thread.
///
/// Dropped, it shows as unanswered. An answer after the inspection, or the update, has ended is discarded.
#[derive(Debug)]
#[must_use = "a deferred request that is dropped shows as unanswered"]
pub struct Deferred {
    path: String,
    question: TakenQuestion,
}

impl Deferred {
    /// Whether the answer is still waited for. Once it is not, it never will be again.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        match &self.question {
            TakenQuestion::Look { sender, .. } => !sender.is_closed(),
            TakenQuestion::Update { sender, .. } => !sender.is_closed(),
        }
    }

    /// Lets `component` answer.
    pub fn inspect(self, component: &(impl Inspect + ?Sized)) {
        self.answer(|request| component.inspect(request));
    }

    /// Lets `component` answer, which needs `&mut` for it.
    pub fn inspect_mut(self, component: &mut (impl InspectMut + ?Sized)) {
        self.answer(|request| component.inspect_mut(request));
    }

    /// Lets a closure answer. It is not called if nobody waits for the answer any more: a late update changes nothing.
    pub fn answer(self, answer: impl FnOnce(Request<'_>)) {
        if !self.is_awaited() {
            return;
        }
        let Self { path, question } = self;
        // The receiver may be gone by the time of the answer: its deadline has passed.
        match question {
            TakenQuestion::Look { depth, view, sender } => {
                let mut slot = Slot::Unanswered;
                answer(Request::look(&path, depth, view, &mut slot));
                let _ = sender.send(slot);
            }
            TakenQuestion::Update { text, sender } => {
                let mut outcome = Outcome::from(Err(UpdateError::Unanswered));
                answer(Request::update(&path, &text, &mut outcome));
                let _ = sender.send(outcome);
            }
        }
    }
}
