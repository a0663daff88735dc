//! Small guests on the machine's KVM. Without /dev/kvm every test here fails, saying why there is none.

mod cpuid;
mod debug;
mod exits;
mod guest;
mod many;
mod opening;
mod state;
