//! Peers, files, configs and guests that mean no good: whoever offends is told or cut off, and nobody else notices.

mod attacks;
mod configs;
mod files;
mod guests;
mod launches;
mod methods;
mod peers;

use std::process::ExitCode;

use guest_tests::requirements::run;

fn main() -> ExitCode {
    let trials = [
        peers::trials(),
        launches::trials(),
        configs::trials(),
        files::trials(),
        methods::trials(),
        guests::trials(),
    ];
    run(trials.into_iter().flatten().collect(), || {})
}
