//! The VPs that ACPI tells of: RSDP, RSDT or XSDT, and the MADT's local APIC entries (ACPI 6.5, 5.2.5 to 5.2.12).

use crate::start_info::load;

const LOCAL_APIC: u8 = 0;
const LOCAL_X2APIC: u8 = 9;
const ENABLED: u32 = 1;
const HEADER_BYTES: u64 = 36;
const MADT_FIXED_BYTES: u64 = 44;

/// Calls `each` with the APIC ID of every enabled VP; with nothing if there are no tables.
pub fn for_each_vp(rsdp: u64, each: impl FnMut(u32)) {
    if let Some(madt) = find_madt(rsdp) {
        walk_madt(madt, each);
    }
}

fn find_madt(rsdp: u64) -> Option<u64> {
    if rsdp == 0 || load::<u64>(rsdp)? != u64::from_le_bytes(*b"RSD PTR ") {
        return None;
    }
    let extended = if load::<u8>(rsdp + 15)? >= 2 { load::<u64>(rsdp + 24)? } else { 0 };
    if extended == 0 {
        let root = u64::from(load::<u32>(rsdp + 16)?);
        return entries(root, 4)?
            .find(|at| is_madt(load::<u32>(*at).map(u64::from)))
            .and_then(|at| load(at).map(u32::into));
    }
    entries(extended, 8)?.find(|at| is_madt(load(*at))).and_then(load)
}

/// Where the entries of a root table are.
fn entries(root: u64, entry_bytes: u64) -> Option<impl Iterator<Item = u64>> {
    let count = u64::from(load::<u32>(root + 4)?).saturating_sub(HEADER_BYTES) / entry_bytes;
    Some((0..count).map(move |index| root + HEADER_BYTES + index * entry_bytes))
}

fn is_madt(table: Option<u64>) -> bool {
    table.and_then(load::<u32>) == Some(u32::from_le_bytes(*b"APIC"))
}

fn walk_madt(madt: u64, mut each: impl FnMut(u32)) {
    let end = madt + u64::from(load::<u32>(madt + 4).unwrap_or(0));
    let mut entry = madt + MADT_FIXED_BYTES;
    while let (true, Some(kind), Some(bytes)) = (entry < end, load::<u8>(entry), load::<u8>(entry + 1)) {
        if let Some(id) = vp_of(kind, entry) {
            each(id);
        }
        // An entry shorter than its own head would never end the walk.
        entry += u64::from(bytes.max(2));
    }
}

fn vp_of(kind: u8, entry: u64) -> Option<u32> {
    let (id, flags) = match kind {
        LOCAL_APIC => (u32::from(load::<u8>(entry + 3)?), load::<u32>(entry + 4)?),
        LOCAL_X2APIC => (load::<u32>(entry + 4)?, load::<u32>(entry + 8)?),
        _ => return None,
    };
    (flags & ENABLED != 0).then_some(id)
}
