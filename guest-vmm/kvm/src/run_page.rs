//! The memory in which KVM says why a VP has left the guest, and in which it is told to leave.

// UNSAFETY: memory shared with the kernel is mapped and read by its layout, `struct kvm_run`.
#![expect(unsafe_code, reason = "memory shared with the kernel is mapped and read by its layout")]

use crate::exit::{Data, Emulation, Exit};
use kvm_bindings::*;
use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// A mapping of a VP's `kvm_run`, apart from the one that the VP's descriptor has, so that other threads can ask for an
/// exit while that one is borrowed.
pub(crate) struct RunMapping {
    base: NonNull<u8>,
    size: usize,
}

// SAFETY: any thread may use what the type itself offers, which is one atomic byte; the rest is reached through `RunPage`,
// of which there is one.
unsafe impl Send for RunMapping {}
// SAFETY: as above.
unsafe impl Sync for RunMapping {}

impl RunMapping {
    /// Maps it. `size` is what KVM_GET_VCPU_MMAP_SIZE says.
    pub(crate) fn new(vcpu: &impl AsRawFd, size: usize) -> io::Result<Self> {
        if size < size_of::<kvm_run>() {
            return Err(io::Error::other(format!(
                "kvm_run has {size} bytes, {} expected",
                size_of::<kvm_run>()
            )));
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, vcpu.as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("a mapping that did not fail is not at address zero");
        Ok(Self { base, size })
    }

    /// Has the VP leave the guest at once, or not any more. Any thread may say so.
    pub(crate) fn set_immediate_exit(&self, exit: bool) {
        let offset = offset_of!(kvm_run, immediate_exit);
        // SAFETY: the byte is in the mapping, which lives as long as `self`, and this process touches it here alone.
        let byte = unsafe { AtomicU8::from_ptr(self.base.as_ptr().add(offset)) };
        byte.store(exit.into(), Ordering::SeqCst);
    }

    fn run(&self) -> *mut kvm_run {
        self.base.cast().as_ptr()
    }
}

impl Drop for RunMapping {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and no reference into it outlives its owner.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.size) };
    }
}

/// What only the VP's thread looks at, while the VP is out of the guest.
pub(crate) struct RunPage(Arc<RunMapping>);

/// Reads a field of `kvm_run`.
macro_rules! field {
    ($page:expr, $($field:tt)+) => {{
        let run = $page.0.run();
        // SAFETY: the mapping is as large as the type, every bit pattern is a value of these integers, and the kernel does not
        // write while the VP's thread is here. The exit reason says which member of the union is in use.
        unsafe { (&raw const (*run).$($field)+).read_volatile() }
    }};
}

impl RunPage {
    /// The only page of this mapping: the caller makes no other.
    pub(crate) fn new(mapping: Arc<RunMapping>) -> Self {
        Self(mapping)
    }

    /// Why KVM_RUN came back.
    pub(crate) fn exit(&self) -> Exit {
        match field!(self, exit_reason) {
            KVM_EXIT_IO => self.io(),
            KVM_EXIT_MMIO => self.mmio(),
            KVM_EXIT_IOAPIC_EOI => Exit::IoapicEoi { vector: field!(self, __bindgen_anon_1.eoi).vector },
            KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            KVM_EXIT_SYSTEM_EVENT => {
                Exit::SystemEvent { kind: field!(self, __bindgen_anon_1.system_event.type_) }
            }
            KVM_EXIT_DEBUG => Exit::Debug { dr6: field!(self, __bindgen_anon_1.debug.arch.dr6) },
            KVM_EXIT_INTERNAL_ERROR => self.internal_error(),
            KVM_EXIT_FAIL_ENTRY => {
                let failure = field!(self, __bindgen_anon_1.fail_entry);
                Exit::FailEntry { reason: failure.hardware_entry_failure_reason, cpu: failure.cpu }
            }
            reason => Exit::Other { reason },
        }
    }

    fn io(&self) -> Exit {
        let io = field!(self, __bindgen_anon_1.io);
        let offset = usize::try_from(io.data_offset).expect("x86-64 has 64 bits");
        let data = Data { offset, len: io.count as usize * usize::from(io.size) };
        let (port, size) = (io.port, io.size);
        if u32::from(io.direction) == KVM_EXIT_IO_IN {
            Exit::IoIn { port, size, data }
        } else {
            Exit::IoOut { port, size, data }
        }
    }

    fn mmio(&self) -> Exit {
        let mmio = field!(self, __bindgen_anon_1.mmio);
        let (address, len) = (mmio.phys_addr, (mmio.len as usize).min(mmio.data.len()));
        let data = Data { offset: offset_of!(kvm_run, __bindgen_anon_1.mmio.data), len };
        if mmio.is_write == 0 { Exit::MmioRead { address, data } } else { Exit::MmioWrite { address, data } }
    }

    fn internal_error(&self) -> Exit {
        let internal = field!(self, __bindgen_anon_1.internal);
        let emulation = (internal.suberror == KVM_INTERNAL_ERROR_EMULATION).then(|| self.emulation());
        Exit::InternalError { suberror: internal.suberror, emulation: emulation.flatten() }
    }

    /// The bytes of the instruction that could not be emulated, if the host gives them: three words of data, flagged.
    fn emulation(&self) -> Option<Emulation> {
        let flagged = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
        let failure = field!(self, __bindgen_anon_1.emulation_failure);
        if failure.ndata < 3 || failure.flags & flagged == 0 {
            return None;
        }
        let instruction = field!(self, __bindgen_anon_1.emulation_failure.__bindgen_anon_1.__bindgen_anon_1);
        Some(Emulation { len: instruction.insn_size, bytes: instruction.insn_bytes })
    }

    /// The data of an exit. Empty if it is not in the mapping, which KVM does not do.
    pub(crate) fn data(&mut self, data: Data) -> &mut [u8] {
        let Data { offset, len } = data;
        if offset.checked_add(len).is_none_or(|end| end > self.0.size) || offset < size_of::<u64>() {
            return &mut [];
        }
        // SAFETY: in the mapping, as was just checked, and behind the byte that other threads write; the kernel does not write
        // while the VP's thread is here, and `self` is the only way to this memory and is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.0.base.as_ptr().add(offset), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::reason;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use vmm_sys_util::tempfile::TempFile;

    const SIZE: usize = size_of::<kvm_run>() + 4096;

    /// A page as KVM would leave it: the exit's number, and what belongs to it at its offset in the page.
    fn page(number: u32, parts: &[(usize, &[u8])]) -> RunPage {
        let file: File = TempFile::new().unwrap().into_file();
        file.set_len(SIZE as u64).unwrap();
        file.write_all_at(&number.to_ne_bytes(), offset_of!(kvm_run, exit_reason) as u64).unwrap();
        for (offset, bytes) in parts {
            file.write_all_at(bytes, *offset as u64).unwrap();
        }
        RunPage::new(Arc::new(RunMapping::new(&file, SIZE).unwrap()))
    }

    /// Where what belongs to an exit begins.
    const DETAILS: usize = offset_of!(kvm_run, __bindgen_anon_1);

    #[test]
    fn every_exit_of_kvm_is_handled_or_a_fault_with_its_name() {
        // The header numbers them without a gap, and this is the last that it has.
        for number in 0..=KVM_EXIT_MEMORY_FAULT {
            let exit = page(number, &[]).exit();
            let expected = match exit {
                Exit::IoIn { .. } | Exit::IoOut { .. } => KVM_EXIT_IO,
                Exit::MmioRead { .. } | Exit::MmioWrite { .. } => KVM_EXIT_MMIO,
                Exit::IoapicEoi { .. } => KVM_EXIT_IOAPIC_EOI,
                fault => {
                    assert!(reason(fault).contains("KVM_EXIT_"), "{number}: {}", reason(fault));
                    continue;
                }
            };
            assert_eq!(number, expected, "{exit:?}");
        }
        let unheard_of = reason(page(KVM_EXIT_MEMORY_FAULT + 1, &[]).exit());
        assert_eq!(unheard_of, "an exit that nothing handles and KVM has had no name for: 40");
    }

    #[test]
    fn an_exit_that_has_its_own_words_says_its_name_in_them() {
        for (number, name) in [
            (KVM_EXIT_SHUTDOWN, "(KVM_EXIT_SHUTDOWN)"),
            (KVM_EXIT_FAIL_ENTRY, "(KVM_EXIT_FAIL_ENTRY)"),
            (KVM_EXIT_SYSTEM_EVENT, "(KVM_EXIT_SYSTEM_EVENT)"),
            (KVM_EXIT_DEBUG, "(KVM_EXIT_DEBUG)"),
            (KVM_EXIT_INTERNAL_ERROR, "(KVM_EXIT_INTERNAL_ERROR)"),
        ] {
            let text = reason(page(number, &[]).exit());
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn an_instruction_that_kvm_gives_up_on_is_shown() {
        let words = [KVM_INTERNAL_ERROR_EMULATION, 4].map(u32::to_ne_bytes).concat();
        let flags = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES).to_ne_bytes();
        let instruction = [3, 0x0f, 0xae, 0xf8];
        let parts = [&words[..], &flags, &instruction].concat();
        let text = reason(page(KVM_EXIT_INTERNAL_ERROR, &[(DETAILS, &parts)]).exit());
        assert!(text.ends_with("suberror 1, EMULATION, at the instruction bytes 0f ae f8"), "{text}");
        let without_flag = [&words[..], &[0; 8], &instruction].concat();
        let text = reason(page(KVM_EXIT_INTERNAL_ERROR, &[(DETAILS, &without_flag)]).exit());
        assert!(text.ends_with("suberror 1, EMULATION"), "{text}");
    }

    #[test]
    fn what_lies_outside_of_the_page_is_no_data() {
        let mut page = page(KVM_EXIT_UNKNOWN, &[(DETAILS, &[1, 2, 3])]);
        assert_eq!(page.data(Data { offset: DETAILS, len: 3 }), [1, 2, 3]);
        assert_eq!(page.data(Data { offset: SIZE - 1, len: 1 }), [0]);
        for (offset, len) in [(SIZE - 1, 2), (SIZE, 1), (usize::MAX, 2), (0, 8)] {
            assert!(page.data(Data { offset, len }).is_empty(), "{len} bytes at {offset}");
        }
    }
}
