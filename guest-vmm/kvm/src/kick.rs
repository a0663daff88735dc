//! Getting a VP out of the guest, from any thread.
//!
//! A kick asks KVM_RUN to come back at once (`immediate_exit`), and interrupts it with a signal if it has been entered. The
//! signal's handler does nothing; it is a real-time signal that had no handler when this crate looked for one.
//!
//! `requested` is set before `immediate_exit` and cleared after it, so that a kick that finds it set may leave the rest to the
//! one that set it: the VP will have left the guest after both.

// UNSAFETY: signals are set up and sent to threads by their number.
#![expect(unsafe_code, reason = "signals are set up and sent to threads by their number")]

use crate::run_page::RunMapping;
use std::io;
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// A VP bound to a thread.
pub(crate) struct Kick {
    pub(crate) page: RunMapping,
    thread: libc::pid_t,
    signal: libc::c_int,
    in_run: AtomicBool,
    requested: AtomicBool,
}

impl Kick {
    /// For a VP that is run by the calling thread, which from now on takes the signal.
    pub(crate) fn new(page: RunMapping) -> io::Result<Arc<Self>> {
        let signal = signal()?;
        unblock(signal)?;
        // SAFETY: it has no arguments and cannot fail.
        let thread = unsafe { libc::gettid() };
        let (in_run, requested) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Arc::new(Self { page, thread, signal, in_run, requested }))
    }

    fn kick(&self) {
        if self.requested.swap(true, Ordering::SeqCst) {
            return;
        }
        self.page.set_immediate_exit(true);
        // A VP that is not in KVM_RUN finds `immediate_exit` set when it enters, and no signal disturbs what it is at.
        while self.in_run.load(Ordering::SeqCst) && self.signal_is_refused() {
            std::thread::yield_now();
        }
    }

    /// Sends the signal. The system refuses it only while this user has too many of them pending.
    fn signal_is_refused(&self) -> bool {
        // SAFETY: the thread is of this process and still there: it leaves its slot, whose lock is held, before it ends.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.thread, self.signal) };
        sent != 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN)
    }

    /// The VP's thread calls KVM_RUN now.
    pub(crate) fn in_run<R>(&self, run: impl FnOnce() -> R) -> R {
        self.in_run.store(true, Ordering::SeqCst);
        let result = run();
        self.in_run.store(false, Ordering::SeqCst);
        result
    }

    /// The VP has left the guest for a kick.
    pub(crate) fn answer(&self) {
        self.page.set_immediate_exit(false);
        self.requested.swap(false, Ordering::SeqCst);
    }

    /// Calls KVM_RUN so that it comes back without having entered the guest. A kick meanwhile stays in force.
    pub(crate) fn without_entering<R>(&self, run: impl FnOnce() -> R) -> R {
        self.page.set_immediate_exit(true);
        let result = run();
        self.page.set_immediate_exit(false);
        if self.requested.load(Ordering::SeqCst) {
            self.page.set_immediate_exit(true);
        }
        result
    }
}

/// Where the partition finds the kick of a VP, and leaves it what only the VP's own thread can do.
#[derive(Default)]
pub(crate) struct KickSlot {
    slot: Mutex<Slot>,
    nmi: AtomicBool,
}

#[derive(Default)]
struct Slot {
    kick: Option<Arc<Kick>>,
    /// Somebody has kicked a VP that was not bound yet.
    early: bool,
}

impl KickSlot {
    /// A panic of another thread leaves the slot whole: it is only set and taken.
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kicks the VP. One that is not bound yet does not enter the guest when it is first run.
    pub(crate) fn kick(&self) {
        let mut slot = self.lock();
        match &slot.kick {
            Some(kick) => kick.kick(),
            None => slot.early = true,
        }
    }

    /// Has the VP take a non-maskable interrupt.
    pub(crate) fn send_nmi(&self) {
        self.nmi.store(true, Ordering::Release);
        self.kick();
    }

    /// Whether the VP is to take a non-maskable interrupt.
    pub(crate) fn take_nmi(&self) -> bool {
        self.nmi.swap(false, Ordering::AcqRel)
    }

    /// The VP is bound.
    pub(crate) fn bind(&self, kick: Arc<Kick>) {
        let mut slot = self.lock();
        if slot.early {
            kick.kick();
        }
        slot.kick = Some(kick);
    }

    /// The VP's thread goes away.
    pub(crate) fn unbind(&self) {
        self.lock().kick = None;
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
