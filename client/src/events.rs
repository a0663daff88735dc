//! What becomes of a guest, as it happens.

use guest_schema::Event;
use guest_schema::guest_capnp::event_sink;
use std::rc::Rc;
use tokio::sync::mpsc;

/// Takes a guest's events, in order. Dropped after the last one, which is `Terminated`.
pub trait Events: 'static {
    /// The next event. Events come no faster than the returned futures complete, and one at a time; nothing else waits for
    /// them. After an error nothing more comes.
    fn event(&self, event: Event) -> impl Future<Output = Result<(), EventsClosed>>;
}

/// Whoever took the events has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("nobody takes these events any more")]
pub struct EventsClosed;

/// The channel ends after the guest's last event.
impl Events for mpsc::Sender<Event> {
    async fn event(&self, event: Event) -> Result<(), EventsClosed> {
        self.send(event).await.map_err(|_| EventsClosed)
    }
}

pub(crate) struct Sink<E>(E);

impl<E: Events> Sink<E> {
    pub fn new(events: E) -> Self {
        Self(events)
    }
}

impl<E: Events> event_sink::Server for Sink<E> {
    async fn event(self: Rc<Self>, params: event_sink::EventParams) -> capnp::Result<()> {
        let taken = self.0.event(Event::read(params.get()?.get_event()?)?).await;
        taken.map_err(|closed| capnp::Error::failed(closed.to_string()))
    }
}
