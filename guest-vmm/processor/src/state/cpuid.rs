//! What CPUID answers a VP.

use inspect::{Inspect, Request};

/// One answer of CPUID (Intel SDM volume 2, CPUID).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names of the results are the architecture's")]
pub struct CpuidLeaf {
    /// The leaf: EAX when CPUID is executed.
    pub function: u32,
    /// The subleaf, ECX when CPUID is executed, if the answer depends on it.
    pub index: Option<u32>,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// All that CPUID answers a VP. A leaf that is not listed answers as the architecture has it for such leaves.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cpuid(pub Vec<CpuidLeaf>);

/// Bits that are cleared in answers of CPUID, to hide what the host's CPU has. A mask only takes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names of the results are the architecture's")]
pub struct CpuidMask {
    /// The leaf: EAX when CPUID is executed.
    pub function: u32,
    /// The subleaf, ECX when CPUID is executed; `None` for every one. A leaf without subleaves has subleaf 0.
    pub index: Option<u32>,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl CpuidMask {
    /// Whether the mask is about this leaf and subleaf.
    pub fn covers(&self, function: u32, index: u32) -> bool {
        self.function == function && self.index.is_none_or(|own| own == index)
    }
}

impl Inspect for CpuidLeaf {
    fn inspect(&self, request: Request<'_>) {
        let &Self { function: _, index: _, eax, ebx, ecx, edx } = self;
        request.respond().hex("eax", eax).hex("ebx", ebx).hex("ecx", ecx).hex("edx", edx);
    }
}

impl Inspect for Cpuid {
    fn inspect(&self, request: Request<'_>) {
        let mut response = request.respond();
        for leaf in &self.0 {
            let name = match leaf.index {
                None => format!("{:#x}", leaf.function),
                Some(index) => format!("{:#x}.{index:#x}", leaf.function),
            };
            response.field(&name, leaf);
        }
    }
}
