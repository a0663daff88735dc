//! What an operator may change of a guest while it lives, besides what the machine has of that kind: writable nodes beside
//! the machine's in the inspection tree.

use crate::log::LogFilter;
use guest_schema::OnReset;
use inspect::{FromText, Response, Value};
use std::cell::Cell;
use std::convert::Infallible;

/// The settings of one guest.
pub(crate) struct Settings {
    on_reset: Cell<OnReset>,
    /// The process's; none where the VMM is a part of somebody else's.
    log: Option<LogFilter>,
}

impl Settings {
    pub fn new(on_reset: OnReset, log: Option<LogFilter>) -> Self {
        Self { on_reset: Cell::new(on_reset), log }
    }

    /// What the next reset by the guest itself does.
    pub fn on_reset(&self) -> OnReset {
        self.on_reset.get()
    }

    /// Adds `on_reset` (`restart` or `stop`) and `log` (the directives of the log's filter), both writable.
    pub fn respond_with(&self, response: &mut Response<'_>) {
        let set = |ResetPolicy(new)| {
            self.on_reset.set(new);
            Ok::<_, Infallible>(ResetPolicy(new))
        };
        response.writable("on_reset", || ResetPolicy(self.on_reset()), set);
        if let Some(log) = &self.log {
            response.writable("log", || log.directives(), |directives: String| log.set(&directives));
        }
    }
}

/// [`OnReset`] as a node's value.
struct ResetPolicy(OnReset);

impl From<ResetPolicy> for Value {
    fn from(ResetPolicy(policy): ResetPolicy) -> Self {
        match policy {
            OnReset::Restart => "restart".into(),
            OnReset::Stop => "stop".into(),
        }
    }
}

impl FromText for ResetPolicy {
    fn from_text(text: &str) -> Option<Self> {
        match text {
            "restart" => Some(Self(OnReset::Restart)),
            "stop" => Some(Self(OnReset::Stop)),
            _ => None,
        }
    }

    fn expected() -> String {
        "restart or stop".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use inspect::{Inspection, Node, Update, UpdateError, View};
    use std::time::Duration;

    fn update(settings: &Settings, path: &str, text: &str) -> Result<Value, UpdateError> {
        let update = Update::start(path, text, |request| settings.respond_with(&mut request.respond()));
        update.finish(Duration::ZERO).now_or_never().expect("nothing is deferred")
    }

    #[test]
    fn what_a_reset_does_can_be_changed_and_read() {
        let settings = Settings::new(OnReset::Stop, None);
        let look = || {
            let inspection = Inspection::start("", 1, View::WithoutSensitive, |request| {
                settings.respond_with(&mut request.respond());
            });
            inspection.finish(Duration::ZERO).now_or_never().expect("nothing is deferred")
        };
        assert_eq!(look().to_string(), "on_reset: stop\n");
        for (text, policy) in [("restart", OnReset::Restart), ("stop", OnReset::Stop)] {
            assert_eq!(update(&settings, "on_reset", text), Ok(text.into()));
            assert_eq!(settings.on_reset(), policy);
        }
        let error = update(&settings, "on_reset", "explode").expect_err("no policy");
        assert_eq!(error.to_string(), "\"explode\" is not restart or stop");
        assert_eq!(look().child("on_reset"), Some(&Node::Value("stop".into())));
    }

    #[test]
    fn without_a_log_of_its_own_there_is_no_filter_to_change() {
        let settings = Settings::new(OnReset::Stop, None);
        assert_eq!(update(&settings, "log", "debug"), Err(UpdateError::NotFound));
    }
}
