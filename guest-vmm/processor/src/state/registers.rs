//! Registers: general, system, debug, extended and model-specific ones.

use inspect::{Inspect, Request};
use std::fmt;

/// The general registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names are the architecture's")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

impl Registers {
    /// Every register by its name, in the order in which people look for them.
    pub fn named(&self) -> [(&'static str, u64); 18] {
        let &Self { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, .. } = self;
        let &Self { r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags, .. } = self;
        [
            ("rip", rip),
            ("rflags", rflags),
            ("rax", rax),
            ("rbx", rbx),
            ("rcx", rcx),
            ("rdx", rdx),
            ("rsi", rsi),
            ("rdi", rdi),
            ("rsp", rsp),
            ("rbp", rbp),
            ("r8", r8),
            ("r9", r9),
            ("r10", r10),
            ("r11", r11),
            ("r12", r12),
            ("r13", r13),
            ("r14", r14),
            ("r15", r15),
        ]
    }
}

impl fmt::Display for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, value)) in self.named().into_iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{name}={value:#x}")?;
        }
        Ok(())
    }
}

impl Inspect for Registers {
    fn inspect(&self, request: Request<'_>) {
        let mut response = request.respond();
        for (name, value) in self.named() {
            response.hex(name, value);
        }
    }
}

/// A segment register with its hidden part (Intel SDM volume 3, section 3.4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// The base address.
    pub base: u64,
    /// The limit in bytes, granularity applied.
    pub limit: u32,
    /// The selector.
    pub selector: u16,
    /// The attributes as in the descriptor's bits 40 to 55: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15.
    pub attributes: u16,
}

/// A descriptor table register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Table {
    /// The linear address of the table.
    pub base: u64,
    /// Its size in bytes, less one.
    pub limit: u16,
}

/// The segment and control registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names are the architecture's")]
pub struct SystemRegisters {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldtr: Segment,
    pub gdtr: Table,
    pub idtr: Table,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

impl SystemRegisters {
    /// The segment registers by their names.
    pub fn segments(&self) -> [(&'static str, &Segment); 8] {
        let Self { cs, ds, es, fs, gs, ss, tr, ldtr, .. } = self;
        [("cs", cs), ("ds", ds), ("es", es), ("fs", fs), ("gs", gs), ("ss", ss), ("tr", tr), ("ldtr", ldtr)]
    }
}

impl Inspect for Segment {
    fn inspect(&self, request: Request<'_>) {
        let &Self { base, limit, selector, attributes } = self;
        let mut response = request.respond();
        response
            .hex("base", base)
            .hex("limit", limit)
            .hex("selector", selector)
            .hex("attributes", attributes);
    }
}

impl Inspect for Table {
    fn inspect(&self, request: Request<'_>) {
        request.respond().hex("base", self.base).hex("limit", self.limit);
    }
}

impl Inspect for SystemRegisters {
    fn inspect(&self, request: Request<'_>) {
        let Self { cr0, cr2, cr3, cr4, efer, gdtr, idtr, .. } = self;
        let mut response = request.respond();
        response.hex("cr0", *cr0).hex("cr2", *cr2).hex("cr3", *cr3).hex("cr4", *cr4).hex("efer", *efer);
        for (name, segment) in self.segments() {
            response.field(name, segment);
        }
        response.field("gdtr", gdtr).field("idtr", idtr);
    }
}

/// The debug registers (Intel SDM volume 3, section 18.2), the guest's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DebugRegisters {
    /// DR0 to DR3.
    pub breakpoints: [u64; 4],
    /// DR6.
    pub status: u64,
    /// DR7.
    pub control: u64,
}

impl Inspect for DebugRegisters {
    fn inspect(&self, request: Request<'_>) {
        let &Self { breakpoints: [dr0, dr1, dr2, dr3], status, control } = self;
        let mut response = request.respond();
        response.hex("dr0", dr0).hex("dr1", dr1).hex("dr2", dr2).hex("dr3", dr3);
        response.hex("dr6", status).hex("dr7", control);
    }
}

/// Registers that are known by their numbers, with their values, in the order in which the host lists them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NumberedRegisters(pub Vec<(u32, u64)>);

impl NumberedRegisters {
    /// The value of a register, if it is among them.
    pub fn get(&self, number: u32) -> Option<u64> {
        self.0.iter().find(|(n, _)| *n == number).map(|(_, value)| *value)
    }
}

impl Inspect for NumberedRegisters {
    fn inspect(&self, request: Request<'_>) {
        let mut response = request.respond();
        for &(number, value) in &self.0 {
            response.hex(&format!("{number:#x}"), value);
        }
    }
}

/// The extended state as XSAVE stores it in its standard form (Intel SDM volume 1, section 13.4): x87, SSE, AVX and what else
/// the VP has. Its size is the host's, at least 576 bytes.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Xsave(pub Vec<u8>);

impl fmt::Debug for Xsave {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Xsave({} bytes)", self.0.len())
    }
}

impl Inspect for Xsave {
    fn inspect(&self, request: Request<'_>) {
        request.value(self.0.clone());
    }
}
