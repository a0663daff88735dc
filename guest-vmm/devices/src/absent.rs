//! A window in which there is no device, taken so that none is put there.

use crate::IoDevice;
use processor::PowerRequest;
use std::ops::ControlFlow;

/// Nothing: it reads as all ones, and ignores what is written, as a bus does on which nobody answers.
#[derive(Debug, Default)]
pub struct Absent;

impl IoDevice for Absent {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _: u64, _: &[u8]) -> ControlFlow<PowerRequest> {
        ControlFlow::Continue(())
    }

    fn reset(&mut self) {}
}
