//! What becomes of guests, their clients and the service when one of them is killed, ends, or goes round and round.

mod in_process;
mod kills;
mod leaks;
mod prepared;
mod service;
mod snapshots;
mod warm;

use std::process::ExitCode;

use guest_tests::requirements::run;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(in_process::ROUNDS) {
        return match in_process::count() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let trials = [
        kills::trials(),
        service::trials(),
        leaks::trials(),
        in_process::trials(),
        warm::trials(),
        prepared::trials(),
        snapshots::trials(),
    ];
    run(trials.into_iter().flatten().collect(), || {})
}
