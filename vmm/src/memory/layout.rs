//! Where RAM lies in the guest-physical address space.

use std::ops::Range;

use migration::guest::MemoryRegion;

/// Addresses below 4 GiB that are not RAM: virtio-mmio windows, IOAPIC, LAPIC, KVM's TSS and identity map.
pub const DEVICE_HOLE: Range<u64> = 3 << 30..4 << 30;

/// The regions of a machine with `mib` MiB, ascending.
pub fn regions(mib: u64) -> Vec<MemoryRegion> {
    let bytes = mib << 20;
    let low = bytes.min(DEVICE_HOLE.start);
    let mut regions = vec![MemoryRegion { gpa: 0, bytes: low }];
    if bytes > low {
        regions.push(MemoryRegion { gpa: DEVICE_HOLE.end, bytes: bytes - low });
    }
    regions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_device_hole_free() {
        assert_eq!(regions(16), [MemoryRegion { gpa: 0, bytes: 16 << 20 }]);
        assert_eq!(regions(3072), [MemoryRegion { gpa: 0, bytes: 3 << 30 }]);
        assert_eq!(
            regions(4096),
            [MemoryRegion { gpa: 0, bytes: 3 << 30 }, MemoryRegion { gpa: 4 << 30, bytes: 1 << 30 }]
        );
    }
}
