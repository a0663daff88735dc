//! Components that react to VM state changes, moved together in dependency order.
//!
//! A [`StateUnit`] is a component that can be started, stopped, reset, saved and restored. It is served by a loop of its
//! own ([`run_unit`]), on whichever task or thread suits it, and added to a set ([`StateUnits`]), which moves all its units
//! together: start, reset and restore go dependencies first, stop dependants first, independent units concurrently. "a
//! depends on b" means that b runs whenever a does.
//!
//! Parts: [`StateUnits`] and its transitions; the graph with [`UnitBuilder`] and [`UnitHandle`]; the phase, which is one
//! pass over the graph; [`StateRequest`], what a unit is asked; [`StateTransitionError`]; the inspector and the timeline.
//!
//! What holds for every transition:
//! - It returns a `Result`. A unit that fails, panics, goes away or is late fails the transition, never the process; the
//!   units that come after it are skipped, and the error names each.
//! - It has one deadline ([`StateUnits::set_deadline`]; `deadline` in the inspection tree is writable). An answer after it is recorded and not acted upon.
//! - It runs to its end, even if the future that asked for it is dropped. The next transition waits for that end.
//!
//! Each transition is a `tracing` span `transition` at level info, within the caller's, and each unit's part in it a span
//! `unit` below; the unit does its work inside, so that what it logs carries its name.
//!
//! Limits: transitions need a `tokio` runtime with time enabled; order through a unit that was removed is not kept; a
//! unit that blocks its thread is late, it cannot be interrupted.
//!
//! ```
//! use inspect::{Inspect, Request};
//! use save_restore::{RestoreError, SaveError, SavedStateBlob};
//! use state_unit::{SaveSupport, StateUnit, StateUnits, UnitError, run_unit};
//!
//! struct Clock { running: bool }
//!
//! impl Inspect for Clock {
//!     fn inspect(&self, request: Request<'_>) {
//!         request.respond().field("running", &self.running);
//!     }
//! }
//!
//! impl StateUnit for Clock {
//!     async fn start(&mut self) -> Result<(), UnitError> {
//!         self.running = true;
//!         Ok(())
//!     }
//!     async fn stop(&mut self) -> Result<(), UnitError> {
//!         self.running = false;
//!         Ok(())
//!     }
//!     async fn reset(&mut self) -> Result<(), UnitError> {
//!         Ok(())
//!     }
//!     fn can_save(&mut self) -> SaveSupport {
//!         SaveSupport::Stateless
//!     }
//!     async fn save(&mut self) -> Result<Option<SavedStateBlob>, SaveError> {
//!         Ok(None)
//!     }
//!     async fn restore(&mut self, _: SavedStateBlob) -> Result<(), RestoreError> {
//!         Err(RestoreError::not_supported("a clock has no state"))
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let units = StateUnits::new();
//! let clock = units.add("clock").spawn(|requests| run_unit(Clock { running: false }, requests))?;
//! let timer = units.add("timer").depends_on(clock.handle())
//!     .spawn(|requests| run_unit(Clock { running: false }, requests))?;
//!
//! units.start().await?; // first the clock, then the timer
//! assert!(units.is_running());
//! units.stop().await?; // first the timer, then the clock
//!
//! assert!(!timer.remove().await?.running);
//! # Ok(())
//! # }
//! ```

mod builder;
mod error;
mod graph;
mod inspector;
mod mailbox;
mod phase;
mod request;
mod restore;
mod set;
mod span;
mod sync;
mod timeline;
mod unit;

pub use builder::{BuildError, NameInUse, SpawnedUnit, UnitBuilder, UnitGone, UnitHandle};
pub use error::{
    FailedUnit, IllegalReason, IllegalTransition, LateUnit, SavedStateMismatch, SkippedUnit,
    StateTransitionError, UnitFailures,
};
pub use graph::UnitState;
pub use inspector::{StateUnitsInspector, UnitView};
pub use mailbox::RequestReceiver;
pub use phase::Operation;
pub use request::{Answer, StateRequest, TransitionInFlight, UnitPanicked};
pub use restore::SavedStateUnit;
pub use set::{SetState, StateUnits, UnitSaveSupport};
pub use timeline::{TransitionRecord, UnitOutcome, UnitRecord};
pub use unit::{SaveSupport, StateUnit, UnitError, run_async_unit, run_unit};
