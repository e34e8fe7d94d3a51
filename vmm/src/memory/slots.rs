//! KVM's memory slots: one a region, in order.

use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Memory, MemoryError, lock};

/// The slots of a machine.
///
/// Each change takes KVM some milliseconds, most of it waiting until no vCPU looks at the old slots any more. So a machine that
/// arrives has none at first, gets them once, with their log on, and while its memory comes.
#[derive(Debug)]
pub struct Slots {
    vm: Arc<VmFd>,
    memory: Memory,
    /// Flags that all of them have; `None` while there are none, and after a change that failed in the midst of them.
    flags: Mutex<Option<u32>>,
}

impl Slots {
    /// For `memory`; the guest does not have it yet.
    pub fn new(vm: Arc<VmFd>, memory: Memory) -> Self {
        Self { vm, memory, flags: Mutex::default() }
    }

    /// Gives the guest its memory. Nothing, if it has it.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Slot`] if KVM refuses.
    pub fn provide(&self) -> Result<(), MemoryError> {
        let mut flags = lock(&self.flags);
        if flags.is_some() { Ok(()) } else { self.set(&mut flags, 0, "creating it") }
    }

    /// Turns the dirty log of every slot on or off; the guest has its memory from here on. Turning it on write-protects every page
    /// that is mapped.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Slot`] if KVM refuses.
    pub fn log(&self, on: bool) -> Result<(), MemoryError> {
        let (wanted, action) =
            if on { (KVM_MEM_LOG_DIRTY_PAGES, "starting its dirty log") } else { (0, "stopping its dirty log") };
        let mut flags = lock(&self.flags);
        if *flags == Some(wanted) { Ok(()) } else { self.set(&mut flags, wanted, action) }
    }

    fn set(&self, known: &mut Option<u32>, flags: u32, action: &'static str) -> Result<(), MemoryError> {
        *known = None;
        for (slot, region) in (0u32..).zip(self.memory.ram().iter()) {
            let request = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a mapping that lives as long as `self.memory`, which `self` holds together with the VM,
            // and the regions do not overlap.
            unsafe { self.vm.set_user_memory_region(request) }.map_err(|source| MemoryError::Slot {
                slot,
                action,
                source,
            })?;
        }
        *known = Some(flags);
        Ok(())
    }
}
