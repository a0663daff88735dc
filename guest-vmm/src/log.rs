//! The log of this process on standard error, whose filter can be changed while it runs.

use std::io;
use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{Registry, fmt};

/// What the log lets through: directives as `RUST_LOG` has them, `info,guest_vmm=debug`.
#[derive(Debug, Clone)]
pub struct LogFilter {
    handle: Handle<EnvFilter, Registry>,
}

/// Why there is no such filter.
#[derive(Debug, thiserror::Error)]
pub enum LogFilterError {
    /// No directive. `off` logs nothing.
    #[error("there is no directive in it")]
    Empty,
    /// A character that no directive has.
    #[error("there is the character {0:?} in it")]
    Character(char),
    /// A directive is malformed.
    #[error(transparent)]
    Directive(#[from] ParseError),
    /// The process logs in another way.
    #[error("the process has a log already")]
    Taken(#[from] TryInitError),
    /// The log is gone.
    #[error("the log is gone")]
    Gone(#[from] reload::Error),
}

fn parse(directives: &str) -> Result<EnvFilter, LogFilterError> {
    if let Some(control) = directives.chars().find(|c| c.is_control()) {
        return Err(LogFilterError::Character(control));
    }
    if directives.split(',').all(|directive| directive.trim().is_empty()) {
        return Err(LogFilterError::Empty);
    }
    Ok(EnvFilter::try_new(directives)?)
}

impl LogFilter {
    /// Begins to log on standard error. guestd adds time and guest.
    ///
    /// # Errors
    /// See [`LogFilterError`].
    pub fn start(directives: &str) -> Result<Self, LogFilterError> {
        let (filter, handle) = reload::Layer::new(parse(directives)?);
        // The pipe of standard error may be gone, which is no reason to stop.
        let lines =
            fmt::layer().without_time().with_ansi(false).with_writer(io::stderr).log_internal_errors(false);
        tracing_subscriber::registry().with(filter).with(lines).try_init()?;
        Ok(Self { handle })
    }

    /// The directives in force.
    pub(crate) fn directives(&self) -> String {
        self.handle.with_current(ToString::to_string).unwrap_or_else(|error| error.to_string())
    }

    /// Puts other directives in force; gives them as they are understood.
    pub(crate) fn set(&self, directives: &str) -> Result<String, LogFilterError> {
        self.handle.reload(parse(directives)?)?;
        Ok(self.directives())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_has_directives_that_can_be_read() {
        for directives in ["info", "off", "guest_vmm=debug,info", "state_unit[phase]=trace,"] {
            parse(directives).unwrap_or_else(|error| panic!("{directives}: {error}"));
        }
        for (directives, reason) in [
            ("", "there is no directive in it"),
            (" , ", "there is no directive in it"),
            ("info\0", "there is the character '\\0' in it"),
            ("info\nwarn", "there is the character '\\n' in it"),
        ] {
            assert_eq!(parse(directives).unwrap_err().to_string(), reason, "{directives:?}");
        }
        assert!(matches!(parse("guest_vmm=loud").unwrap_err(), LogFilterError::Directive(_)));
    }

    #[test]
    fn a_filter_is_replaced_as_a_whole_or_not_at_all() {
        let (layer, handle) = reload::Layer::new(parse("info").unwrap());
        let filter = LogFilter { handle };
        assert_eq!(filter.directives(), "info");
        assert_eq!(filter.set("guest_vmm=debug,warn").unwrap(), "guest_vmm=debug,warn");
        filter.set("warn,guest_vmm=loud").unwrap_err();
        assert_eq!(filter.directives(), "guest_vmm=debug,warn");
        drop(layer);
        assert!(matches!(filter.set("info").unwrap_err(), LogFilterError::Gone(_)));
    }
}
