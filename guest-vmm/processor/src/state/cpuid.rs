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
