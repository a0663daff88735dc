//! One lab for all tests of a test binary.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Lab, LabError};

/// A lab that is booted when it is first needed. Keep it in a `static`.
#[derive(Debug, Default)]
pub struct SharedLab {
    lab: Mutex<Option<Result<Arc<Lab>, Arc<LabError>>>>,
}

impl SharedLab {
    /// A lab that is not booted yet.
    pub const fn new() -> Self {
        SharedLab { lab: Mutex::new(None) }
    }

    /// The lab, booted by the first call with `binaries` as for [`Lab::boot`]; other calls wait for that.
    ///
    /// # Errors
    /// As [`Lab::boot`]. It is not tried again: every later call gets the same error.
    pub fn get(&self, binaries: impl FnOnce() -> Vec<PathBuf>) -> Result<Arc<Lab>, Arc<LabError>> {
        let mut lab = self.lock();
        lab.get_or_insert_with(|| Lab::boot(&binaries()).map(Arc::new).map_err(Arc::new)).clone()
    }

    /// Calls `test` with the lab, and if that fails once more with a lab of its own: the emulator was seen to break its guests, and
    /// now and then itself; what is our fault comes again. The first failure is written to standard error, with `name`.
    ///
    /// # Errors
    /// That of the second attempt; of the first one when the shared lab is not there.
    pub fn attempt(
        &self,
        name: &str,
        binaries: impl Fn() -> Vec<PathBuf>,
        test: impl Fn(&Lab) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let Err(first) = test(&*self.get(&binaries)?) else { return Ok(()) };
        eprintln!("{name} fails in the shared lab, and is tried once more in a lab of its own: {first:?}");
        test(&Lab::boot(&binaries())?)
    }

    /// Ends the lab, once nobody else holds it. A `static` is never dropped, so the `main` of the tests calls this.
    pub fn close(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Result<Arc<Lab>, Arc<LabError>>>> {
        self.lab.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
