//! Any steps of a driver with the entropy device.

#![no_main]

use devices::virtio::Rng;
use guest_fuzz::{Step, play};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: Vec<Step>| play(steps, || Rng::spec("rng")));
