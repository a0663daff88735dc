//! Labs for all tests of a test binary.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;

use super::{DebianKernel, Lab, LabError};

/// The most labs at a time. Each takes a processor, and about 2 GiB of memory.
const MOST: usize = 2;

/// Labs that are booted when they are first needed, of which each test has one to itself while it runs. Keep it in a `static`.
#[derive(Debug, Default)]
pub struct LabPool {
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    idle: Vec<Lab>,
    /// How many are in use.
    taken: usize,
    /// Why none can be booted.
    failure: Option<Arc<LabError>>,
}

impl LabPool {
    /// No lab is booted yet.
    pub const fn new() -> Self {
        let state = State { idle: Vec::new(), taken: 0, failure: None };
        Self { state: Mutex::new(state), returned: Condvar::new() }
    }

    /// Calls `test` with a lab that is booted with `guests` and `binaries` as for [`Lab::boot`]; `binaries` are the same in every call.
    /// A lab in which a test has failed is not used again.
    ///
    /// # Errors
    /// That of the test. As [`Lab::boot`], which is not tried again: every later call gets the same error.
    pub fn lend<E: From<Arc<LabError>>>(
        &self,
        guests: DebianKernel,
        binaries: impl FnOnce() -> Vec<PathBuf>,
        test: impl FnOnce(&Lab) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut loan = Loan { pool: self, lab: Some(self.take(guests, binaries)?) };
        let result = test(loan.lab.as_ref().expect("it was taken"));
        if result.is_err() {
            loan.lab = None;
        }
        result
    }

    /// The same, and if the test fails once more in a new lab: the emulator was seen to break its guests, and now and then itself; what
    /// is our fault comes again. The first failure is written to standard error, with `name`.
    ///
    /// # Errors
    /// That of the second attempt; of the first one when there is no lab.
    pub fn attempt(
        &self,
        name: &str,
        guests: DebianKernel,
        binaries: impl Fn() -> Vec<PathBuf>,
        test: impl Fn(&Lab) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let Err(first) = self.lend(guests, &binaries, &test) else { return Ok(()) };
        if self.lock().failure.is_some() {
            return Err(first);
        }
        eprintln!("{name} fails, and is tried once more in a new lab: {first:?}");
        test(&Lab::boot(guests, &binaries())?)
    }

    /// Ends the labs that nobody uses. A `static` is never dropped, so the `main` of the tests calls this.
    pub fn close(&self) {
        self.lock().idle.clear();
    }

    /// One lab is booted at a time, while others wait. One that is idle ends if its place is needed for guests of another kernel.
    fn take(
        &self,
        guests: DebianKernel,
        binaries: impl FnOnce() -> Vec<PathBuf>,
    ) -> Result<Lab, Arc<LabError>> {
        let most = available_parallelism().map_or(1, |processors| processors.get().min(MOST));
        let mut state = self.lock();
        while state.idle.is_empty() && state.taken >= most {
            state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        let fits = state.idle.iter().position(|lab| lab.guests == guests);
        if fits.is_none() && state.idle.len() + state.taken >= most {
            state.idle.pop();
        }
        let boot = || Lab::boot(guests, &binaries()).map_err(Arc::new);
        let lab = fits.map_or_else(boot, |index| Ok(state.idle.swap_remove(index)));
        state.failure = lab.as_ref().err().cloned();
        state.taken += usize::from(lab.is_ok());
        lab
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A lab in use. It goes back when this is dropped, if it is still here.
struct Loan<'a> {
    pool: &'a LabPool,
    lab: Option<Lab>,
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        let idle = self.lab.take().filter(|_| !std::thread::panicking());
        let mut state = self.pool.lock();
        state.idle.extend(idle);
        state.taken -= 1;
        self.pool.returned.notify_one();
    }
}
