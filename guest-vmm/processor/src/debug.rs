//! What a debugger wants a VP to stop for.

/// What a VP is to stop for, beside the VMM's wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DebugState {
    /// After one instruction ([`crate::VpHaltReason::SingleStep`]).
    pub single_step: bool,
    /// At these ([`crate::VpHaltReason::HwBreak`]): as many as the architecture has registers for.
    pub breakpoints: [Option<HardwareBreakpoint>; 4],
}

/// A hardware breakpoint or watchpoint (Intel SDM volume 3, section 18.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HardwareBreakpoint {
    /// The linear address, a multiple of the length.
    pub address: u64,
    /// How many bytes: 1, 2, 4 or 8; 1 for [`AccessKind::Execute`].
    pub length: u8,
    /// What is watched for.
    pub access: AccessKind,
}

/// What of the guest's a breakpoint stops at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// The instruction there is about to be executed.
    Execute,
    /// The bytes have been written.
    Write,
    /// The bytes have been read or written.
    ReadOrWrite,
}

impl HardwareBreakpoint {
    /// Whether the architecture has such a breakpoint.
    pub fn is_valid(&self) -> bool {
        let length = match self.access {
            AccessKind::Execute => self.length == 1,
            AccessKind::Write | AccessKind::ReadOrWrite => matches!(self.length, 1 | 2 | 4 | 8),
        };
        length && self.address.is_multiple_of(self.length.into())
    }
}

impl std::fmt::Display for HardwareBreakpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match self.access {
            AccessKind::Execute => "execution",
            AccessKind::Write => "a write",
            AccessKind::ReadOrWrite => "an access",
        };
        write!(f, "{what} of {} bytes at {:#x}", self.length, self.address)
    }
}

/// What a hypervisor can watch for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DebugCapabilities {
    /// [`DebugState::single_step`].
    pub single_step: bool,
    /// How many of [`DebugState::breakpoints`].
    pub breakpoints: usize,
    /// Whether breakpoints may be for anything but [`AccessKind::Execute`].
    pub watchpoints: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breakpoints_are_those_of_the_architecture() {
        let valid = |address, length, access| HardwareBreakpoint { address, length, access }.is_valid();
        assert!(valid(0x1001, 1, AccessKind::Execute));
        assert!(!valid(0x1000, 2, AccessKind::Execute));
        assert!(valid(0x1008, 8, AccessKind::Write));
        assert!(!valid(0x1004, 8, AccessKind::Write), "not aligned");
        assert!(!valid(0x1000, 3, AccessKind::ReadOrWrite));
        assert!(!valid(0x1000, 0, AccessKind::Write));
    }
}
