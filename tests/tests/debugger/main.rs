//! The debugger: what `GuestControl.debugger` gives, on a scripted processor and on KVM, over a guest's own channel and through the
//! service; and `guestctl debug` with Debian's gdb.

mod gdb;
mod kernel;
mod stories;

use guest_tests::requirements::{Requirement, run, trial};
use guest_tests::stage::{Channel, Kind, Stage, Story, play_on};
use libtest_mimic::Trial;
use std::pin::Pin;
use std::process::ExitCode;

type Played = Pin<Box<dyn Future<Output = Story>>>;

/// A story by its name.
type Named = (&'static str, fn(Stage) -> Played);

macro_rules! stories {
    ($module:ident: $($name:ident,)*) => {
        &[$((stringify!($name), |stage| Box::pin($module::$name(stage)))),*]
    };
}

const STORIES: &[Named] = stories! { stories:
    a_guest_is_stopped_looked_into_and_goes_on,
    breakpoints_and_steps_stop_a_guest,
    registers_are_set,
    a_guest_is_held_before_its_first_instruction,
    others_pause_resume_reset_and_stop_a_debugged_guest,
    a_guest_has_one_debugger_at_a_time,
    a_debugger_whose_connection_ends_leaves_nothing_behind,
    what_cannot_be_is_refused,
};

/// With gdb, on KVM.
const WITH_GDB: &[Named] = stories! { gdb:
    gdb_breaks_steps_and_looks_around,
    gdb_sees_the_built_in_guest_through_its_page_tables,
    gdb_interrupts_and_hears_of_the_guests_end,
    one_gdb_comes_after_the_other,
    a_signal_ends_the_command_and_the_guest_goes_on,
};

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for story in STORIES {
        for kind in [Kind::Scripted, Kind::BuiltIn] {
            for channel in [Channel::Direct, Channel::Proxied] {
                let needs: &[Requirement] = if kind == Kind::BuiltIn { &[Requirement::Kvm] } else { &[] };
                trials.push(rehearse(*story, kind, channel, needs));
            }
        }
    }
    for story in WITH_GDB {
        trials.push(rehearse(*story, Kind::BuiltIn, Channel::Direct, &[Requirement::Kvm, Requirement::Gdb]));
    }
    run(trials, || {})
}

fn rehearse((name, play): Named, kind: Kind, channel: Channel, needs: &'static [Requirement]) -> Trial {
    let held = if channel == Channel::Direct { "direct" } else { "proxied" };
    trial(&format!("{}::{held}::{name}", kind.name()), needs, move || {
        play_on(Stage::set(kind, channel, "")?, play)
    })
}
