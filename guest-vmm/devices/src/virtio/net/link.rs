//! The link of a network device: whether it is up, by the host's wish and the back end's life.

use crate::virtio::Interrupt;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// What happened to a link by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// The back end is gone, and so the link is down for good. With the reason.
    BackendGone(String),
}

/// Told of what happens to a link; called on the I/O thread, must not block.
pub type LinkWatcher = Box<dyn Fn(LinkEvent) + Send + Sync>;

/// The host's end of a device's link. Clones are the same one.
#[derive(Clone)]
pub struct Link(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    interrupt: Arc<Interrupt>,
    watcher: Option<LinkWatcher>,
    switched: Notify,
}

#[derive(Debug, Clone)]
struct State {
    /// The host wants it to be up.
    enabled: bool,
    /// Why the back end is gone, if it is.
    gone: Option<String>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Link").field(&*self.state()).finish()
    }
}

impl Link {
    /// A link that is up.
    pub(super) fn new(interrupt: Arc<Interrupt>, watcher: Option<LinkWatcher>) -> Self {
        let (state, switched) = (Mutex::new(State { enabled: true, gone: None }), Notify::new());
        Self(Arc::new(Inner { state, interrupt, watcher, switched }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether frames go through: the host has not switched it off, and there is a back end.
    pub fn is_up(&self) -> bool {
        let state = self.state();
        state.enabled && state.gone.is_none()
    }

    /// Whether the host wants it to be up.
    pub fn is_enabled(&self) -> bool {
        self.state().enabled
    }

    /// Switches it on or off; the driver is told. Without a back end it stays down.
    pub fn set_enabled(&self, enabled: bool) {
        let was = std::mem::replace(&mut self.state().enabled, enabled);
        if was != enabled {
            self.0.interrupt.config_changed();
            self.0.switched.notify_one();
        }
    }

    /// Waits until it was switched since this was waited for last. For one who waits; may be cancelled at any time.
    pub(super) async fn switched(&self) {
        self.0.switched.notified().await;
    }

    /// Why there is no back end, if there is none.
    pub fn gone(&self) -> Option<String> {
        self.state().gone.clone()
    }

    pub(super) fn is_gone(&self) -> bool {
        self.state().gone.is_some()
    }

    /// The back end is gone. Driver and watcher are told of the first reason.
    pub(super) fn lose(&self, reason: &str) {
        let mut state = self.state();
        if state.gone.is_some() {
            return;
        }
        state.gone = Some(reason.to_owned());
        drop(state);
        tracing::warn!(reason, "the back end of a network device is gone");
        self.0.interrupt.config_changed();
        if let Some(watcher) = &self.0.watcher {
            watcher(LinkEvent::BackendGone(reason.to_owned()));
        }
    }
}
