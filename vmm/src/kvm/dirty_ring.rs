//! The dirty ring of a vCPU (KVM API, 8.29): pages in the order in which that vCPU wrote them.
//!
//! ```text
//!   KVM      0 ──> DIRTY      a page was written, and may be written again without a further entry
//!   harvest  DIRTY ──> RESET  read here, `next` goes on
//!   KVM      RESET ──> 0      by KVM_RESET_DIRTY_RINGS: the page is write-protected again, the place free
//! ```
//!
//! What is harvested must be read for a copy only after the reset: a write between the two leaves no entry.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::ioctl::ioctl;

use super::KvmError;
use super::error::ioctl_error;
use super::request::KVM_RESET_DIRTY_RINGS;

/// Why a vCPU left the guest: its ring has no room left.
pub const EXIT_RING_FULL: u32 = kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;

/// `KVM_DIRTY_GFN_F_DIRTY`.
const DIRTY: u32 = 1;
/// `KVM_DIRTY_GFN_F_RESET`.
const RESET: u32 = 2;

const ENTRY_BYTES: usize = size_of::<kvm_dirty_gfn>();
const _: () = assert!(ENTRY_BYTES == 16);
const PAGE_BYTES: i64 = 4096;

/// Most entries of a ring: those of a MiB, at most what this host's KVM takes.
const ENTRIES_MAX: u64 = 1 << 16;
/// Fewest: KVM keeps some hundreds for itself.
const ENTRIES_MIN: u64 = 1 << 12;

/// Which capability gives rings, and how many entries each may have; `None` if this KVM has none.
pub fn offered(kvm: &Kvm) -> Option<(u32, u32)> {
    // The newer one promises less ordering to the kernel and is served by the same code.
    [KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL].into_iter().find_map(|cap| {
        let bytes = usize::try_from(kvm.check_extension_raw(cap.into())).ok()?;
        let entries = u32::try_from(bytes / ENTRY_BYTES).ok()?;
        (u64::from(entries) >= ENTRIES_MIN).then_some((cap, entries))
    })
}

/// How many entries the rings of a machine with so many pages should have: one a page, within limits. A power of two.
pub fn entries_for(pages: u64, most: u32) -> u32 {
    let wanted = pages.clamp(ENTRIES_MIN, ENTRIES_MAX).next_power_of_two();
    let most = 1u64 << most.max(1).ilog2();
    wanted.min(most) as u32
}

/// Gives each vCPU that will be made a ring of so many entries. The dirty log can then not be read in any other way.
///
/// # Errors
///
/// [`KvmError::Ioctl`] if KVM refuses; it does once there are vCPUs.
pub fn enable(vm: &VmFd, cap: u32, entries: u32) -> Result<(), KvmError> {
    let mut request = kvm_enable_cap { cap, ..Default::default() };
    request.args[0] = u64::from(entries) * ENTRY_BYTES as u64;
    vm.enable_cap(&request).map_err(ioctl_error("KVM_ENABLE_CAP(DIRTY_LOG_RING)"))
}

/// Write-protects all pages whose entries were harvested and frees these; returns how many.
///
/// Since Linux 6.16 it stops when a signal is pending, and then forgets to protect up to 64 pages whose entries it has freed
/// (`kvm_dirty_ring_reset`): further writes to them are never recorded. Signals are therefore held back meanwhile. SIGSTOP, a freezer
/// and a debugger cannot be; a result that is less than what was harvested tells of that, unless they come at the last entry.
///
/// # Errors
///
/// [`KvmError::Ioctl`] if KVM refuses.
pub fn reset(vm: &VmFd) -> Result<u32, KvmError> {
    let _undisturbed = Undisturbed::begin();
    // SAFETY: the request has no argument.
    let result = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
    u32::try_from(result).map_err(|_| ioctl_error("KVM_RESET_DIRTY_RINGS")(Errno::last()))
}

/// While it exists this thread gets no signal that can be held back; they come afterwards.
struct Undisturbed(libc::sigset_t);

impl Undisturbed {
    fn begin() -> Self {
        // SAFETY: all-zero is a valid set of signals.
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
        // SAFETY: both sets are valid for writing, and this fails for no valid set.
        unsafe {
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        }
        Self(before)
    }
}

impl Drop for Undisturbed {
    fn drop(&mut self) {
        // SAFETY: the set is the one that was in force before.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

/// The ring of one vCPU.
#[derive(Debug)]
pub struct Ring {
    entries: *mut kvm_dirty_gfn,
    count: u32,
    next: u32,
}

// SAFETY: the pointer leads into a mapping that only this value unmaps; entries are accessed under `&mut self`.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of a vCPU.
    ///
    /// # Errors
    ///
    /// [`KvmError::Ioctl`] if it has none.
    pub fn new(vcpu: &VcpuFd, count: u32) -> Result<Self, KvmError> {
        Self::map(libc::MAP_SHARED, vcpu.as_raw_fd(), i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_BYTES, count)
    }

    fn map(flags: i32, file: RawFd, offset: i64, count: u32) -> Result<Self, KvmError> {
        let (length, protection) = (count as usize * ENTRY_BYTES, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, file, offset) };
        if address == libc::MAP_FAILED {
            return Err(ioctl_error("mapping the dirty ring of a vCPU")(Errno::last()));
        }
        Ok(Self { entries: address.cast(), count, next: 0 })
    }

    /// Entries that it has room for.
    pub fn capacity(&self) -> u32 {
        self.count
    }

    /// Hands out slot and page of each new entry, and returns how many there were.
    pub fn harvest(&mut self, mut take: impl FnMut(u32, u64)) -> u32 {
        let mut found = 0;
        // Never more than there is room for: it ends even if the guest writes as fast as this reads.
        while found < self.count {
            // SAFETY: the index is below `count`, so that the entry is within the mapping.
            let entry = unsafe { self.entries.add((self.next % self.count) as usize) };
            // SAFETY: KVM writes `flags` last and with release semantics; nobody else writes to a dirty entry. `flags` is the
            // first field, aligned to 4.
            let flags = unsafe { &*entry.cast::<AtomicU32>() };
            if flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
                break;
            }
            // SAFETY: the entry is complete, and KVM leaves it alone until it is marked.
            let (slot, offset) = unsafe { ((*entry).slot, (*entry).offset) };
            flags.store(RESET, Ordering::Release);
            take(slot, offset);
            self.next = self.next.wrapping_add(1);
            found += 1;
        }
        found
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and ends here.
        unsafe { libc::munmap(self.entries.cast(), self.count as usize * ENTRY_BYTES) };
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// The side of the ring that is KVM's (`virt/kvm/dirty_ring.c`), without its limit: a vCPU that is not stopped in time.
    pub(crate) struct Kvm {
        entries: *mut kvm_dirty_gfn,
        count: u32,
        dirty: u32,
        reset: u32,
    }

    /// A ring in plain memory, and who writes to it; to be dropped before the ring.
    pub(crate) fn pair(count: u32) -> (Ring, Kvm) {
        let ring = Ring::map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0, count).unwrap();
        let kvm = Kvm { entries: ring.entries, count, dirty: 0, reset: 0 };
        (ring, kvm)
    }

    impl Kvm {
        fn entry(&mut self, index: u32) -> &mut kvm_dirty_gfn {
            // SAFETY: within the mapping, which lives; one thread uses it.
            unsafe { &mut *self.entries.add((index % self.count) as usize) }
        }

        /// Entries that are neither free nor freed by a reset.
        pub(crate) fn used(&self) -> u32 {
            self.dirty.wrapping_sub(self.reset)
        }

        pub(crate) fn push(&mut self, offset: u64) {
            *self.entry(self.dirty) = kvm_dirty_gfn { flags: DIRTY, slot: 0, offset };
            self.dirty = self.dirty.wrapping_add(1);
        }

        pub(crate) fn reset(&mut self) -> u32 {
            let first = self.reset;
            while self.entry(self.reset).flags & RESET != 0 {
                self.entry(self.reset).flags = 0;
                self.reset = self.reset.wrapping_add(1);
            }
            self.reset.wrapping_sub(first)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_are_powers_of_two_within_their_limits() {
        assert_eq!(entries_for(1, 1 << 16), 1 << 12);
        assert_eq!(entries_for(5000, 1 << 16), 1 << 13);
        assert_eq!(entries_for(1 << 30, 1 << 20), 1 << 16);
        assert_eq!(entries_for(1 << 30, 5000), 1 << 12);
    }
}
