//! KVM's memory slots: one a region, in order.

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Memory, MemoryError};

/// The slots of a machine.
#[derive(Debug)]
pub struct Slots {
    vm: Arc<VmFd>,
    memory: Memory,
}

impl Slots {
    /// Gives the guest its memory.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Slot`] if KVM refuses.
    pub fn new(vm: Arc<VmFd>, memory: Memory) -> Result<Self, MemoryError> {
        let slots = Self { vm, memory };
        slots.set(0, "creating it")?;
        Ok(slots)
    }

    /// Turns the dirty log of every slot on or off. Turning it on write-protects every page that is mapped.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Slot`] if KVM refuses.
    pub fn log(&self, on: bool) -> Result<(), MemoryError> {
        if on {
            self.set(KVM_MEM_LOG_DIRTY_PAGES, "starting its dirty log")
        } else {
            self.set(0, "stopping its dirty log")
        }
    }

    fn set(&self, flags: u32, action: &'static str) -> Result<(), MemoryError> {
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
        Ok(())
    }
}
