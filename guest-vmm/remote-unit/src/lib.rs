//! A state unit that lives in another process, joined to a set of units here.
//!
//! Its requests are calls of the schema's `StateUnit` interface. A unit that does not answer within its deadline, or whose
//! connection is lost, either fails the transition or leaves the graph, as [`WhenLost`] says; nobody waits for it longer than
//! that.
//!
//! ```no_run
//! # use guest_schema::config_capnp::state_unit::Client;
//! # use remote_unit::{RemoteUnit, RemoteUnitOptions, WhenLost};
//! # use state_unit::StateUnits;
//! # fn join(units: &StateUnits, client: Client) -> Result<(), state_unit::BuildError> {
//! let disk = units.add("disk").spawn_local(|requests| async { drop(requests) })?;
//! let options = RemoteUnitOptions { when_lost: WhenLost::Evict, ..RemoteUnitOptions::default() };
//! let backup = RemoteUnit::join(units.add("backup").depends_on(disk.handle()), client, options)?;
//! # drop(backup);
//! # Ok(())
//! # }
//! ```
//!
//! Limits: a unit is asked one thing at a time, but for inspection; what it shows is JSON of at most one message.

mod error;
mod shown;
mod unit;

pub use error::RemoteUnitError;
pub use unit::{RemoteUnit, RemoteUnitOptions, WhenLost};
