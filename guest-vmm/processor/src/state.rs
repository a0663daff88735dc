//! The architectural state of an x86-64 VP, as far as a boot loader sets it and a report shows it.

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

impl std::fmt::Display for Registers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Registers {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        } = self;
        write!(f, "rip={rip:#x} rflags={rflags:#x} rax={rax:#x} rbx={rbx:#x} rcx={rcx:#x} rdx={rdx:#x} ")?;
        write!(f, "rsi={rsi:#x} rdi={rdi:#x} rsp={rsp:#x} rbp={rbp:#x} r8={r8:#x} r9={r9:#x} r10={r10:#x} ")?;
        write!(f, "r11={r11:#x} r12={r12:#x} r13={r13:#x} r14={r14:#x} r15={r15:#x}")
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

/// What a VP is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MpState {
    /// It runs, or would if its thread let it.
    Runnable,
    /// It waits in HLT for an interrupt.
    Halted,
    /// It waits to be started by INIT and SIPI.
    WaitForSipi,
}

/// Access to the state of a stopped VP.
pub trait AccessVpState {
    /// What can go wrong.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The general registers.
    fn registers(&mut self) -> Result<Registers, Self::Error>;

    /// Sets the general registers.
    fn set_registers(&mut self, value: &Registers) -> Result<(), Self::Error>;

    /// The segment and control registers.
    fn system_registers(&mut self) -> Result<SystemRegisters, Self::Error>;

    /// Sets the segment and control registers. What the type does not hold keeps its value.
    fn set_system_registers(&mut self, value: &SystemRegisters) -> Result<(), Self::Error>;

    /// What the VP is doing.
    fn mp_state(&mut self) -> Result<MpState, Self::Error>;
}

/// Any hypervisor's error about a VP's state.
pub type StateError = Box<dyn std::error::Error + Send + Sync>;

/// [`AccessVpState`] with its error erased, so that it can be a trait object.
pub trait ErasedVpState {
    /// As [`AccessVpState::registers`].
    fn registers(&mut self) -> Result<Registers, StateError>;

    /// As [`AccessVpState::set_registers`].
    fn set_registers(&mut self, value: &Registers) -> Result<(), StateError>;

    /// As [`AccessVpState::system_registers`].
    fn system_registers(&mut self) -> Result<SystemRegisters, StateError>;

    /// As [`AccessVpState::set_system_registers`].
    fn set_system_registers(&mut self, value: &SystemRegisters) -> Result<(), StateError>;

    /// As [`AccessVpState::mp_state`].
    fn mp_state(&mut self) -> Result<MpState, StateError>;
}

impl<T: AccessVpState> ErasedVpState for T {
    fn registers(&mut self) -> Result<Registers, StateError> {
        Ok(AccessVpState::registers(self)?)
    }

    fn set_registers(&mut self, value: &Registers) -> Result<(), StateError> {
        Ok(AccessVpState::set_registers(self, value)?)
    }

    fn system_registers(&mut self) -> Result<SystemRegisters, StateError> {
        Ok(AccessVpState::system_registers(self)?)
    }

    fn set_system_registers(&mut self, value: &SystemRegisters) -> Result<(), StateError> {
        Ok(AccessVpState::set_system_registers(self, value)?)
    }

    fn mp_state(&mut self) -> Result<MpState, StateError> {
        Ok(AccessVpState::mp_state(self)?)
    }
}
