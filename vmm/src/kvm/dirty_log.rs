//! The dirty log of a memory slot (KVM API, 4.8 and 4.117), without an allocation a call.

use kvm_bindings::{
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::KvmError;
use super::error::ioctl_error;
use super::request::{KVM_CLEAR_DIRTY_LOG, KVM_GET_DIRTY_LOG};

/// Words of one `KVM_CLEAR_DIRTY_LOG`: 256 MiB of guest memory. KVM holds its MMU lock during one call, and a vCPU that
/// faults meanwhile waits.
const CLEAR_WORDS: usize = 1024;

/// Reads the log of `slot` into `words`, bit 0 of word 0 being the slot's first page.
///
/// # Errors
///
/// [`KvmError::Ioctl`] if the slot does not exist or is not being logged.
pub fn get(vm: &VmFd, slot: u32, words: &mut [u64]) -> Result<(), KvmError> {
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() },
    };
    // SAFETY: KVM writes one bit a page of the slot, rounded up to words; `words` was sized from the slot's length.
    let result = unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) };
    if result == 0 { Ok(()) } else { Err(ioctl_error("KVM_GET_DIRTY_LOG")(Errno::last())) }
}

/// Clears in KVM what is set in `words`, and write-protects these pages again; `pages` is the slot's length.
///
/// # Errors
///
/// [`KvmError::Ioctl`] if KVM refuses.
pub fn clear(vm: &VmFd, slot: u32, pages: u64, words: &[u64]) -> Result<(), KvmError> {
    for (index, chunk) in words.chunks(CLEAR_WORDS).enumerate() {
        let Some(last) = chunk.iter().rposition(|&word| word != 0) else { continue };
        let start = chunk.iter().position(|&word| word != 0).unwrap_or(0);
        let first_page = ((index * CLEAR_WORDS + start) * 64) as u64;
        let chunk = &chunk[start..=last];
        let request = kvm_clear_dirty_log {
            slot,
            num_pages: (pages - first_page).min(chunk.len() as u64 * 64) as u32,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: chunk.as_ptr().cast_mut().cast() },
        };
        // SAFETY: KVM reads `num_pages` bits of the bitmap, which are within `chunk`; it does not write to it.
        let result = unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &request) };
        if result != 0 {
            return Err(ioctl_error("KVM_CLEAR_DIRTY_LOG")(Errno::last()));
        }
    }
    Ok(())
}
