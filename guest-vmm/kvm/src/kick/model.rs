//! Models of kicks, on `loom`: each is run once for every order in which its threads can meet, up to a bound on how often they interrupt
//! each other. A kick that is lost shows as a deadlock.
//!
//! KVM_RUN is modelled by what matters here: it looks at `immediate_exit` once it has been entered, then stays in the guest
//! until a signal comes. A signal that comes to a thread outside of it is gone by the time it is entered.

use super::{Kick, KickSlot, RunsVp};
use loom::model::Builder;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::{Condvar, Mutex};
use loom::thread;
use std::sync::Arc;

/// Runs `model` in every order with at most this many interruptions of a thread that could have gone on.
const MAX_PREEMPTIONS: usize = 2;

fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound.get_or_insert(MAX_PREEMPTIONS);
    builder.check(model);
}

#[derive(Default)]
struct Kvm {
    immediate_exit: AtomicBool,
    signals: Mutex<Signals>,
    changed: Condvar,
    /// What the VP is to see once it has left the guest: set before kicks, as the executor's state is.
    news: AtomicBool,
}

#[derive(Default)]
struct Signals {
    in_kernel: bool,
    pending: bool,
    /// How many more signals the system refuses.
    refused: u32,
}

impl RunsVp for Arc<Kvm> {
    fn set_immediate_exit(&self, exit: bool) {
        self.immediate_exit.store(exit, Ordering::Release);
    }

    fn send_signal(&self) -> bool {
        let mut signals = self.signals.lock().unwrap();
        if let Some(fewer) = signals.refused.checked_sub(1) {
            signals.refused = fewer;
            return false;
        }
        signals.pending = signals.in_kernel;
        self.changed.notify_one();
        true
    }
}

impl Kvm {
    /// KVM_RUN, of a guest that never leaves by itself.
    fn run(&self) {
        self.signals.lock().unwrap().in_kernel = true;
        // The kernel's own look at the byte has no order but that of entering it.
        if !self.immediate_exit.load(Ordering::Relaxed) {
            let mut signals = self.signals.lock().unwrap();
            while !signals.pending {
                signals = self.changed.wait(signals).unwrap();
            }
        }
        let mut signals = self.signals.lock().unwrap();
        (signals.in_kernel, signals.pending) = (false, false);
    }
}

/// What a processor does until it has the news: it runs the guest, and looks whenever it has left it.
fn run_until_news(kvm: &Kvm, kick: &Kick<Arc<Kvm>>) {
    while !kvm.news.load(Ordering::Relaxed) {
        kick.in_run(|| kvm.run());
        kick.answer();
    }
}

fn new_vp() -> (Arc<Kvm>, Arc<Kick<Arc<Kvm>>>) {
    let kvm = Arc::new(Kvm::default());
    let kick = Kick::new(kvm.clone());
    (kvm, kick)
}

/// Tells the VP the news and kicks it.
fn tell(kvm: &Kvm, kick: &Kick<Arc<Kvm>>) {
    kvm.news.store(true, Ordering::Relaxed);
    kick.kick();
}

#[test]
fn a_kick_is_not_lost_wherever_the_vp_is() {
    explore(|| {
        let (kvm, kick) = new_vp();
        let other = (kvm.clone(), kick.clone());
        let other = thread::spawn(move || tell(&other.0, &other.1));
        run_until_news(&kvm, &kick);
        other.join().unwrap();
    });
}

#[test]
fn a_kick_that_leaves_the_rest_to_another_is_not_lost() {
    explore(|| {
        let (kvm, kick) = new_vp();
        let one = kick.clone();
        let one = thread::spawn(move || one.kick());
        let other = (kvm.clone(), kick.clone());
        let other = thread::spawn(move || tell(&other.0, &other.1));
        run_until_news(&kvm, &kick);
        one.join().unwrap();
        other.join().unwrap();
    });
}

#[test]
fn a_kick_while_an_exit_is_completed_stays_in_force() {
    explore(|| {
        let (kvm, kick) = new_vp();
        let other = (kvm.clone(), kick.clone());
        let other = thread::spawn(move || tell(&other.0, &other.1));
        kick.without_entering(|| kvm.run());
        run_until_news(&kvm, &kick);
        other.join().unwrap();
    });
}

#[test]
fn a_signal_that_the_system_refuses_is_sent_again() {
    explore(|| {
        let (kvm, kick) = new_vp();
        kvm.signals.lock().unwrap().refused = 1;
        let other = (kvm.clone(), kick.clone());
        let other = thread::spawn(move || tell(&other.0, &other.1));
        run_until_news(&kvm, &kick);
        other.join().unwrap();
    });
}

#[test]
fn an_nmi_is_taken_once_wherever_the_vp_is() {
    explore(|| {
        let (kvm, kick) = new_vp();
        let slot = Arc::new(KickSlot::default());
        let other = slot.clone();
        // Sent to a VP that is yet to be bound, that is on its way into the guest, or in it.
        let other = thread::spawn(move || other.send_nmi());
        slot.bind(kick.clone());
        while !slot.take_nmi() {
            kick.in_run(|| kvm.run());
            kick.answer();
        }
        other.join().unwrap();
        assert!(!slot.take_nmi());
        slot.unbind();
        slot.kick();
    });
}

#[test]
fn a_kick_of_a_vp_that_is_yet_to_be_bound_is_kept() {
    explore(|| {
        let ((kvm, kick), slot) = (new_vp(), KickSlot::default());
        slot.kick();
        slot.bind(kick.clone());
        kick.in_run(|| kvm.run());
    });
}
