//! KVM's dirty log: one bitmap a slot.
//!
//! With manual protection a collection has two halves: reading the log, which is a copy of a bitmap, and clearing it, which
//! walks and write-protects the pages. While the machine is paused nothing can be written, so that the second half is put
//! off until it runs again: at the end of a migration it never does, and the downtime is shorter by it.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use migration::guest::PAGE_BYTES;

use crate::kvm::{KvmError, dirty_log};

/// What was read of the log of one machine.
#[derive(Debug)]
pub(super) struct Log {
    vm: Arc<VmFd>,
    manual: bool,
    /// For each slot its length in bytes, and pages that were reported but not cleared in KVM yet.
    reported: Vec<(u64, Vec<u64>)>,
}

impl Log {
    /// `manual`: it is cleared by a request of its own.
    pub(super) fn new(vm: Arc<VmFd>, manual: bool) -> Self {
        Self { vm, manual, reported: Vec::new() }
    }

    pub(super) fn begin(&mut self, slots: impl Iterator<Item = u64>) {
        self.reported = slots.map(|bytes| (bytes, vec![0; words(bytes)])).collect();
    }

    pub(super) fn end(&mut self) {
        self.reported = Vec::new();
    }

    /// Sets `words` to what was written in a slot since the last call.
    pub(super) fn collect(&mut self, slot: u32, words: &mut [u64], paused: bool) -> Result<(), KvmError> {
        dirty_log::get(&self.vm, slot, words)?;
        let Some((bytes, reported)) = self.reported.get_mut(slot as usize) else { return Ok(()) };
        for (word, reported) in words.iter_mut().zip(reported.iter_mut()) {
            let fresh = *word & !*reported;
            *reported |= *word;
            *word = fresh;
        }
        if paused && self.manual {
            return Ok(());
        }
        clear(&self.vm, self.manual, slot, *bytes, reported)
    }

    /// Makes up for what was put off.
    pub(super) fn before_run(&mut self) -> Result<(), KvmError> {
        for (slot, (bytes, reported)) in (0u32..).zip(&mut self.reported) {
            clear(&self.vm, self.manual, slot, *bytes, reported)?;
        }
        Ok(())
    }
}

fn clear(vm: &VmFd, manual: bool, slot: u32, bytes: u64, reported: &mut [u64]) -> Result<(), KvmError> {
    if manual {
        dirty_log::clear(vm, slot, bytes / PAGE_BYTES, reported)?;
    }
    reported.fill(0);
    Ok(())
}

/// Words of a bitmap over so much memory.
pub(super) fn words(bytes: u64) -> usize {
    (bytes / PAGE_BYTES).div_ceil(64) as usize
}
