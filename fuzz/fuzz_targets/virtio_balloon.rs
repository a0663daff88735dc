//! Any steps of a driver with the balloon.

#![no_main]

use devices::virtio::balloon::Balloon;
use devices::virtio::fake_driver::RAM_BYTES;
use guest_fuzz::{Step, play};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: Vec<Step>| play(steps, || Balloon::spec("balloon", RAM_BYTES).0));
