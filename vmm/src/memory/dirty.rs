//! Which pages were written: by vCPUs (KVM's dirty log) and by the VMM's own devices (vm-memory's bitmap), merged.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use migration::guest::PAGE_BYTES;
use migration::page::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Memory, Slots};
use crate::kvm::{KvmError, dirty_log};

/// Tracking failed.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// A memory slot.
    #[error(transparent)]
    Slots(#[from] super::MemoryError),
    /// The log.
    #[error(transparent)]
    Log(#[from] KvmError),
    /// The caller's bitmap has another size.
    #[error("a bitmap of {found} bits was given for {pages} pages: both hosts must agree on the layout")]
    Size {
        /// Bits of the caller's bitmap.
        found: u64,
        /// Pages of the machine.
        pages: u64,
    },
}

/// Records written pages of one machine.
///
/// With manual protection a collection has two halves: reading the log, which is a copy of a bitmap, and clearing it, which
/// walks and write-protects the pages. While the machine is paused nothing can be written, so that the second half is put
/// off until it runs again: at the end of a migration it never does, and the downtime is shorter by it.
#[derive(Debug)]
pub struct DirtyTracker {
    vm: Arc<VmFd>,
    memory: Memory,
    slots: Slots,
    manual: bool,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    on: bool,
    /// For each slot, pages that were reported but not cleared in KVM yet.
    reported: Vec<Vec<u64>>,
    scratch: Vec<u64>,
}

impl DirtyTracker {
    /// A tracker that is off; `manual` if KVM's log is cleared by a request of its own.
    pub fn new(vm: Arc<VmFd>, memory: Memory, slots: Slots, manual: bool) -> Self {
        Self { vm, memory, slots, manual, log: Mutex::default() }
    }

    /// Starts to record. Idempotent.
    ///
    /// # Errors
    ///
    /// [`TrackError`] if KVM refuses.
    pub fn start(&self) -> Result<(), TrackError> {
        let mut log = self.lock();
        if !log.on {
            for region in self.memory.ram().iter() {
                (**region).bitmap().reset();
            }
            self.slots.log(true)?;
            log.reported = self.memory.regions().iter().map(|region| vec![0; words(region.bytes)]).collect();
            log.on = true;
        }
        Ok(())
    }

    /// Stops recording. Idempotent.
    ///
    /// # Errors
    ///
    /// [`TrackError`] if KVM refuses.
    pub fn stop(&self) -> Result<(), TrackError> {
        let mut log = self.lock();
        if log.on {
            self.slots.log(false)?;
            *log = Log::default();
        }
        Ok(())
    }

    /// Sets in `into` every page written since the last call. `paused`: no vCPU can run until [`Self::before_run`].
    ///
    /// # Errors
    ///
    /// [`TrackError`] if tracking is off, or KVM refuses.
    pub fn collect(&self, into: &mut Bitmap, paused: bool) -> Result<(), TrackError> {
        let pages = self.memory.pages();
        if into.len() != pages {
            return Err(TrackError::Size { found: into.len(), pages });
        }
        let mut guard = self.lock();
        let log = &mut *guard;
        let mut base = 0;
        for (slot, region) in (0u32..).zip(self.memory.ram().iter()) {
            let count = words(region.len());
            log.scratch.clear();
            log.scratch.resize(count, 0);
            dirty_log::get(&self.vm, slot, &mut log.scratch)?;
            // Devices write through the host's mapping, which KVM does not see. Their bitmap is read after the log and
            // forgotten at once: a later write sets it again.
            let written_by_devices = (**region).bitmap().get_and_reset();
            if let Some(reported) = log.reported.get_mut(slot as usize) {
                for (index, (word, device_word)) in log.scratch.iter_mut().zip(written_by_devices).enumerate() {
                    let fresh = *word & !reported[index];
                    reported[index] |= *word;
                    insert_bits(into, base + index as u64 * 64, fresh | device_word);
                }
                self.clear_reported(slot, region.len() / PAGE_BYTES, reported, paused)?;
            }
            base += region.len() / PAGE_BYTES;
        }
        Ok(())
    }

    /// To be called before vCPUs run again: from here on a write to a page that was reported while the machine was paused
    /// is seen.
    ///
    /// # Errors
    ///
    /// [`TrackError`] if KVM refuses.
    pub fn before_run(&self) -> Result<(), TrackError> {
        let mut log = self.lock();
        for (slot, region) in (0u32..).zip(self.memory.regions()) {
            if let Some(reported) = log.reported.get_mut(slot as usize) {
                self.clear_reported(slot, region.bytes / PAGE_BYTES, reported, false)?;
            }
        }
        Ok(())
    }

    fn clear_reported(&self, slot: u32, pages: u64, reported: &mut [u64], paused: bool) -> Result<(), KvmError> {
        if self.manual && paused {
            return Ok(());
        }
        if self.manual {
            dirty_log::clear(&self.vm, slot, pages, reported)?;
        }
        reported.fill(0);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn words(bytes: u64) -> usize {
    (bytes / PAGE_BYTES).div_ceil(64) as usize
}

/// Sets 64 bits from `first`. Regions are multiples of a MiB, so that `first` is a multiple of 64.
fn insert_bits(into: &mut Bitmap, first: u64, bits: u64) {
    if bits != 0 {
        into.insert_word(first / 64, bits);
    }
}
