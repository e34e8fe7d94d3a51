//! Is a layout from the wire one that a machine can have?

use super::WireError;
use super::bounded::MAX_ITEMS;
use crate::guest::{MachineLayout, PAGE_BYTES};
use crate::policy::Limits;

/// Most guest memory: 64 TiB.
const MAX_PAGES: u64 = 1 << 34;
/// Largest disk: 8 EiB less a block, so that sums do not overflow.
const MAX_DISK_BYTES: u64 = (1 << 63) - (1 << 16);
/// Longest name of anything.
const MAX_NAME: usize = 256;

/// Checks a layout before anything is built or allocated by it.
///
/// # Errors
///
/// [`WireError::Malformed`] with the first thing that is wrong.
pub fn check(layout: &MachineLayout, streams: u16) -> Result<(), WireError> {
    let wrong = |detail: String| Err(WireError::Malformed { kind: "layout", detail });
    if !(1..=Limits::MAX_STREAMS).contains(&streams) {
        return wrong(format!("{streams} memory channels; 1 to {} are possible", Limits::MAX_STREAMS));
    }
    if layout.memory.len().max(layout.disks.len()).max(layout.devices.len()) > MAX_ITEMS {
        return wrong(format!("more than {MAX_ITEMS} regions, disks or devices"));
    }
    let names = layout.disks.iter().map(|disk| &disk.id).chain(layout.devices.iter().map(|slot| &slot.name));
    if names.chain([&layout.machine]).any(|name| name.is_empty() || name.len() > MAX_NAME) {
        return wrong(format!("a name that is empty or longer than {MAX_NAME} bytes"));
    }
    let (mut end, mut pages) = (0u64, 0u64);
    for region in &layout.memory {
        let Some(next) = region.gpa.checked_add(region.bytes) else {
            return wrong(format!("a region at {:#x} that passes the end of addresses", region.gpa));
        };
        if region.bytes == 0 || region.gpa % PAGE_BYTES != 0 || region.bytes % PAGE_BYTES != 0 || region.gpa < end {
            return wrong(format!(
                "a region at {:#x} of {} bytes: empty, unaligned or overlapping",
                region.gpa, region.bytes
            ));
        }
        (end, pages) = (next, pages + region.bytes / PAGE_BYTES);
    }
    if pages == 0 || pages > MAX_PAGES {
        return wrong(format!("{pages} pages of memory; 1 to {MAX_PAGES} are possible"));
    }
    if let Some(disk) = layout.disks.iter().find(|disk| disk.bytes == 0 || disk.bytes > MAX_DISK_BYTES) {
        return wrong(format!("disk `{}` of {} bytes", disk.id, disk.bytes));
    }
    Ok(())
}
