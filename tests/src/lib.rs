//! The integration harness: private guestd, guests, the lab; conformance, faults, load, benchmarks.
//!
//! Parts, lowest first: [`wait`] waits for conditions, [`output`] collects what a process writes, [`process`]
//! starts processes that die with the tests, [`census`] counts what they hold, [`requirements`] says what a test needs of
//! its machine and names the tests that are left out, [`lab`] is a machine with a mainline `/dev/kvm` in software, [`service`] is
//! a private guestd, [`console`] a guest's serial port, [`driver`] a script's virtio driver, [`bare`] the protocol without the
//! client library, [`stage`] joins them for stories of a guest's life, and [`mod@bench`] measures it.
//!
//! Limits: Linux on x86-64 only; the lab's kernel comes from Debian's archive.

pub mod bare;
pub mod bench;
pub mod census;
pub mod console;
pub mod driver;
pub mod lab;
pub mod output;
pub mod process;
pub mod requirements;
pub mod service;
pub mod stage;
pub mod unit;
pub mod wait;
