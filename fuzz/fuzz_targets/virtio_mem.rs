//! Any steps of a driver with the memory device.

#![no_main]

use devices::virtio::fake_driver::RAM_BYTES;
use devices::virtio::mem::{Geometry, Mem};
use guest_fuzz::{Step, play};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: Vec<Step>| play(steps, || mem()));

/// The upper half of the memory in blocks of 1 MiB, of which the host wants half.
fn mem() -> devices::virtio::VirtioSpec {
    let geometry = Geometry::new(RAM_BYTES / 2..RAM_BYTES, 1 << 20).expect("whole blocks");
    let half = geometry.region_bytes() / 2;
    let (spec, handle) = Mem::spec("mem", geometry);
    handle.request(half).expect("whole blocks of the region's");
    spec
}
