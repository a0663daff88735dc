//! gdb's breakpoints and watchpoints, and the hardware ones that serve them.

use gdbstub::target::ext::breakpoints::WatchKind;
use guest_client::{Breakpoint, BreakpointAccess};

/// What gdb has asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A software breakpoint, served by a hardware one: nothing is written into the guest's code.
    Software,
    /// A hardware breakpoint.
    Hardware,
    /// A watchpoint.
    Watch(WatchKind),
}

/// gdb's breakpoints. Several at one place share a hardware breakpoint.
#[derive(Debug, Clone, Default)]
pub struct Breakpoints(Vec<(Kind, Breakpoint)>);

impl Breakpoints {
    /// With one more; none if the architecture has no such breakpoint.
    pub fn with(&self, kind: Kind, address: u64, length: u64) -> Option<Self> {
        let breakpoint = breakpoint(kind, address, length)?;
        let mut all = self.clone();
        if !all.0.contains(&(kind, breakpoint)) {
            all.0.push((kind, breakpoint));
        }
        Some(all)
    }

    /// Without this one; none if it is not there.
    pub fn without(&self, kind: Kind, address: u64, length: u64) -> Option<Self> {
        let gone = (kind, breakpoint(kind, address, length)?);
        let at = self.0.iter().position(|wanted| *wanted == gone)?;
        let mut rest = self.clone();
        rest.0.remove(at);
        Some(rest)
    }

    /// The hardware breakpoints for all of them.
    pub fn hardware(&self) -> Vec<Breakpoint> {
        let mut hardware = Vec::new();
        for (_, breakpoint) in &self.0 {
            if !hardware.contains(breakpoint) {
                hardware.push(*breakpoint);
            }
        }
        hardware
    }

    /// Which kind was hit, with that hardware breakpoint.
    pub fn kind_of(&self, hit: &Breakpoint) -> Option<Kind> {
        self.0.iter().find(|(_, breakpoint)| breakpoint == hit).map(|(kind, _)| *kind)
    }
}

fn breakpoint(kind: Kind, address: u64, length: u64) -> Option<Breakpoint> {
    let access = match kind {
        Kind::Software | Kind::Hardware => return Some(Breakpoint::execute(address)),
        Kind::Watch(WatchKind::Write) => BreakpointAccess::Write,
        Kind::Watch(WatchKind::ReadWrite) => BreakpointAccess::ReadOrWrite,
        // x86 cannot watch for reads alone.
        Kind::Watch(WatchKind::Read) => return None,
    };
    let length = u8::try_from(length).ok().filter(|length| matches!(length, 1 | 2 | 4 | 8))?;
    address.is_multiple_of(length.into()).then_some(Breakpoint { address, length, access })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: Kind = Kind::Watch(WatchKind::Write);

    #[test]
    fn software_and_hardware_breakpoints_at_one_place_share_one() {
        let both = Breakpoints::default().with(Kind::Software, 0x1000, 1).expect("valid");
        let both = both.with(Kind::Hardware, 0x1000, 1).expect("valid");
        let again = both.with(Kind::Software, 0x1000, 1).expect("valid");
        assert_eq!(again.hardware(), [Breakpoint::execute(0x1000)]);
        assert_eq!(again.kind_of(&Breakpoint::execute(0x1000)), Some(Kind::Software));
        let one = again.without(Kind::Software, 0x1000, 1).expect("there");
        assert_eq!(one.hardware(), [Breakpoint::execute(0x1000)]);
        assert_eq!(one.kind_of(&Breakpoint::execute(0x1000)), Some(Kind::Hardware));
        assert!(one.without(Kind::Software, 0x1000, 1).is_none());
        assert!(one.without(Kind::Hardware, 0x1000, 1).expect("there").hardware().is_empty());
    }

    #[test]
    fn watchpoints_are_those_of_the_architecture() {
        let none = Breakpoints::default();
        let watched = none.with(WRITE, 0x2008, 8).expect("valid");
        let access = BreakpointAccess::Write;
        assert_eq!(watched.hardware(), [Breakpoint { address: 0x2008, length: 8, access }]);
        for (address, length) in [(0x2004, 8), (0x2000, 3), (0x2000, 0), (0x2000, 1 << 32 | 8)] {
            assert!(none.with(WRITE, address, length).is_none(), "{address:#x} {length}");
        }
        assert!(none.with(Kind::Watch(WatchKind::Read), 0x2000, 8).is_none());
    }
}
