//! A VP's extended state, whose size is the host's.

// UNSAFETY: the extended state is handed over in a buffer whose size the call cannot know.
#![expect(
    unsafe_code,
    reason = "the extended state is handed over in a buffer whose size the call cannot know"
)]

use crate::error::{KvmError, Named};
use crate::hypervisor::Host;
use kvm_bindings::{kvm_xsave, kvm_xsave2};
use kvm_ioctls::VcpuFd;
use processor::{NotSupported, Xsave};

/// The buffer of a host's size.
type Buffer = kvm_bindings::Xsave;

/// A host's size is at least that of this type; what is beyond comes in words behind it.
fn buffer(host: &Host) -> Buffer {
    let words = host.xsave_size.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    Buffer::new(words).expect("a few KiB")
}

pub(crate) fn get(vcpu: &VcpuFd, host: &Host) -> Result<Xsave, KvmError> {
    if host.xsave_size <= size_of::<kvm_xsave>() {
        return Ok(bytes(&vcpu.get_xsave().named("KVM_GET_XSAVE")?.region, &[]));
    }
    let mut buffer = buffer(host);
    // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 says, and the process does not ask for larger states later on.
    unsafe { vcpu.get_xsave2(&mut buffer) }.named("KVM_GET_XSAVE2")?;
    Ok(bytes(&buffer.as_fam_struct_ref().xsave.region, buffer.as_slice()))
}

fn bytes(region: &[u32], rest: &[u32]) -> Xsave {
    let mut bytes = vec![0; size_of_val(region) + size_of_val(rest)];
    let (first, second) = bytes.split_at_mut(size_of_val(region));
    for (bytes, words) in [(first, region), (second, rest)] {
        bytes.as_chunks_mut().0.iter_mut().zip(words).for_each(|(to, word)| *to = word.to_le_bytes());
    }
    Xsave(bytes)
}

/// A state of another size than the host's is taken if nothing of it is lost.
pub(crate) fn set(vcpu: &VcpuFd, host: &Host, value: &Xsave) -> Result<(), KvmError> {
    let mut buffer = buffer(host);
    let (chunks, incomplete) = value.0.as_chunks();
    let mut last = [0; size_of::<u32>()];
    last[..incomplete.len()].copy_from_slice(incomplete);
    let mut words = chunks.iter().chain([&last]).map(|bytes| u32::from_le_bytes(*bytes));
    // SAFETY: only the state is written, not the length of what is behind it.
    let kvm_xsave2 { xsave, .. } = unsafe { buffer.as_mut_fam_struct() };
    xsave.region.iter_mut().zip(&mut words).for_each(|(to, word)| *to = word);
    buffer.as_mut_slice().iter_mut().zip(&mut words).for_each(|(to, word)| *to = word);
    if words.any(|word| word != 0) {
        let size = value.0.len();
        return Err(NotSupported(format!("an extended state of {size} bytes").into()).into());
    }
    // SAFETY: the buffer has the size that the host's KVM reads.
    unsafe { vcpu.set_xsave2(&buffer) }.named("KVM_SET_XSAVE")
}
