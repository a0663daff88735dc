//! The thread that runs a VP, as other threads get it out of KVM_RUN: by a byte in the run page, and by a signal.
//!
//! The signal's handler does nothing; it is a real-time signal that had no handler when this crate looked for one.

// UNSAFETY: signals are set up and sent to threads by their number.
#![expect(unsafe_code, reason = "signals are set up and sent to threads by their number")]

use crate::kick::RunsVp;
use crate::run_page::RunMapping;
use std::io;
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::{Arc, OnceLock};

/// A thread that runs a VP.
pub(crate) struct RunThread {
    page: Arc<RunMapping>,
    thread: libc::pid_t,
    signal: libc::c_int,
}

impl RunThread {
    /// The calling thread, which from now on takes the signal.
    pub(crate) fn current(page: Arc<RunMapping>) -> io::Result<Self> {
        let signal = signal()?;
        unblock(signal)?;
        // SAFETY: it has no arguments and cannot fail.
        let thread = unsafe { libc::gettid() };
        Ok(Self { page, thread, signal })
    }
}

impl RunsVp for RunThread {
    fn set_immediate_exit(&self, exit: bool) {
        self.page.set_immediate_exit(exit);
    }

    /// The system refuses it only while this user has too many of them pending.
    fn send_signal(&self) -> bool {
        // SAFETY: the thread is of this process and still there: it leaves its slot, whose lock is held, before it ends.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.thread, self.signal) };
        sent == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EAGAIN)
    }
}

/// The signal, its handler in place. Set up once per process.
fn signal() -> io::Result<libc::c_int> {
    static SIGNAL: OnceLock<Result<libc::c_int, i32>> = OnceLock::new();
    let set_up = || set_up().map_err(|error| error.raw_os_error().unwrap_or(libc::EBUSY));
    SIGNAL.get_or_init(set_up).map_err(io::Error::from_raw_os_error)
}

/// Takes the first real-time signal that nobody handles.
fn set_up() -> io::Result<libc::c_int> {
    for signal in libc::SIGRTMIN()..=libc::SIGRTMAX() {
        if handler(signal)? == libc::SIG_DFL {
            install(signal)?;
            return Ok(signal);
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

fn handler(signal: libc::c_int) -> io::Result<libc::sighandler_t> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: it only writes to `action`.
    check(unsafe { libc::sigaction(signal, null(), action.as_mut_ptr()) })?;
    // SAFETY: all zeroes is a value of the type, and the call has filled it.
    Ok(unsafe { action.assume_init() }.sa_sigaction)
}

fn install(signal: libc::c_int) -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: all zeroes is a value of the type: no flags, among them no SA_RESTART, and an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: the handler does nothing, which any thread may do at any time.
    check(unsafe { libc::sigaction(signal, &raw const action, null_mut()) })
}

fn unblock(signal: libc::c_int) -> io::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: the set is a local, emptied before it is used.
    let error = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), null_mut())
    };
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
