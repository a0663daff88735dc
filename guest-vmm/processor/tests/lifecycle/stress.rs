//! Rounds that would hang on a lost wake-up. `GUESTD_TEST_SCALE` is a factor to their number.

use crate::guest::{Guest, PATIENCE, SERIAL};
use futures::executor::block_on;
use futures::future::{join, join_all};
use processor::DebugState;
use processor::scripted::{Script, ScriptedOptions};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};

/// A number of rounds, scaled.
fn rounds(number: u32) -> u32 {
    let scale = std::env::var("GUESTD_TEST_SCALE").ok();
    let scale = scale.map_or(1.0, |text| text.parse().expect("GUESTD_TEST_SCALE is a number"));
    let scaled = f64::from(number) * scale;
    let fits = scaled.is_finite() && (0.0..=f64::from(u32::MAX)).contains(&scaled);
    assert!(fits, "GUESTD_TEST_SCALE={scale}");
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above")]
    let scaled = scaled as u32;
    scaled.max(1)
}

/// Runs the rounds, and panics if for a long time none of them is finished.
fn watched(number: u32, mut round: impl FnMut(u32)) {
    let finished = AtomicU32::new(0);
    let (done, is_done) = channel::<()>();
    std::thread::scope(|scope| {
        let finished = &finished;
        scope.spawn(move || {
            let mut before = finished.load(Ordering::Relaxed);
            while let Err(RecvTimeoutError::Timeout) = is_done.recv_timeout(PATIENCE) {
                let now = finished.load(Ordering::Relaxed);
                if now == before {
                    eprintln!("no round was finished in {PATIENCE:?}: a wake-up was lost");
                    std::process::abort(); // the thread that hangs cannot be unwound
                }
                before = now;
            }
        });
        for n in 0..number {
            round(n);
            finished.fetch_add(1, Ordering::Relaxed);
        }
        drop(done);
    });
}

fn spinning() -> Script {
    let mut script = Script::new();
    script.spin();
    script
}

/// A script that is in a device most of the time.
fn printing() -> Script {
    let mut script = Script::new();
    let again = script.here();
    script.echo(SERIAL, 0x80).jump(again);
    script
}

#[test]
fn a_million_rounds_of_start_and_stop() {
    let guest = Guest::new(&spinning());
    watched(rounds(1_000_000), |_| {
        block_on(guest.vps[0].start()).unwrap();
        block_on(guest.vps[0].stop()).unwrap();
    });
    guest.assert_no_halt();
}

fn start_access_stop(script: &Script, number: u32) {
    let guest = Guest::new(script);
    let vp = &guest.vps[0];
    watched(number, |_| {
        block_on(vp.start()).unwrap();
        block_on(vp.access(|state| state.mp_state().unwrap())).unwrap();
        block_on(vp.stop()).unwrap();
    });
    guest.assert_no_halt();
}

#[test]
fn rounds_of_start_access_and_stop_while_spinning() {
    start_access_stop(&spinning(), rounds(100_000));
}

#[test]
fn rounds_of_start_access_and_stop_while_in_devices() {
    start_access_stop(&printing(), rounds(100_000));
}

#[test]
fn rounds_of_start_and_stop_among_other_calls() {
    // hlt, so that non-maskable interrupts are taken; and back to it.
    let mut script = Script::new();
    let again = script.here();
    script.hlt().jump(again);
    let guest = Guest::new(&script);
    let (vp, partition, over) = (&guest.vps[0], &*guest.partition, AtomicBool::new(false));
    let until_over = |call: &dyn Fn()| {
        while !over.load(Ordering::Relaxed) {
            call();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| until_over(&|| block_on(vp.access(|_| ())).unwrap()));
        scope.spawn(|| until_over(&|| block_on(vp.set_debug_state(Some(DebugState::default()))).unwrap()));
        scope.spawn(|| until_over(&|| partition.inject_nmi(vp.vp())));
        watched(rounds(20_000), |_| {
            block_on(vp.start()).unwrap();
            block_on(vp.stop()).unwrap();
        });
        over.store(true, Ordering::Relaxed);
    });
    guest.assert_no_halt();
}

#[test]
fn rounds_of_calls_that_race() {
    let guest = Guest::with(&spinning(), 2, ScriptedOptions::default());
    watched(rounds(20_000), |_| {
        let starts = guest.vps.iter().map(|vp| async {
            let access = || vp.access(|_| ());
            let (started, accessed) = join(vp.start(), access()).await;
            started.unwrap();
            accessed.unwrap();
            let (accessed, stopped) = join(access(), vp.stop()).await;
            accessed.unwrap();
            stopped.unwrap();
        });
        block_on(join_all(starts));
    });
}

#[test]
fn rounds_of_access_under_a_storm_of_kicks() {
    let guest = Guest::new(&spinning());
    guest.start();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                guest.partition.request_yield(guest.vps[0].vp());
            }
        });
        watched(rounds(20_000), |_| block_on(guest.vps[0].access(|_| ())).unwrap());
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn rounds_of_spawn_and_shutdown() {
    watched(rounds(1_000), |n| {
        let guest = Guest::with(&spinning(), 2, ScriptedOptions::default());
        if n % 2 == 0 {
            guest.start();
        }
        for vp in guest.vps {
            block_on(vp.shutdown());
        }
    });
}
