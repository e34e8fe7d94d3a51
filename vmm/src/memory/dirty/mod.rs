//! Which pages were written: by vCPUs (KVM's dirty log or its dirty rings) and by the VMM's own devices (vm-memory's bitmap),
//! merged.

mod log;
mod ring;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use migration::guest::PAGE_BYTES;
use migration::page::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use self::log::{Log, words};
use self::ring::OVERRUN;
use super::{Memory, Slots};
use crate::kvm::KvmError;

pub use ring::DirtyRings;

/// Tracking failed.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// A memory slot.
    #[error(transparent)]
    Slots(#[from] super::MemoryError),
    /// The log.
    #[error(transparent)]
    Log(#[from] KvmError),
    /// The thread that harvests rings.
    #[error("cannot start the thread that harvests dirty rings: raise the limit of processes (ulimit -u, pids cgroup)")]
    Thread(#[source] std::io::Error),
    /// Nothing is recorded.
    #[error("written pages were asked for, and nobody records them: this is an error of Headroom, please report it")]
    Off,
    /// The caller's bitmap has another size.
    #[error("a bitmap of {found} bits was given for {pages} pages: both hosts must agree on the layout")]
    Size {
        /// Bits of the caller's bitmap.
        found: u64,
        /// Pages of the machine.
        pages: u64,
    },
}

/// Who knows what vCPUs wrote.
#[derive(Debug)]
enum Record {
    Log(Log),
    Rings(Arc<DirtyRings>),
}

impl Record {
    /// No written page was lost so far.
    fn is_trusted(&self) -> bool {
        match self {
            Self::Log(_) => true,
            Self::Rings(rings) => !rings.overrun(),
        }
    }

    fn end(&mut self) -> Result<(), KvmError> {
        match self {
            Self::Log(log) => {
                log.end();
                Ok(())
            }
            Self::Rings(rings) => rings.end(),
        }
    }
}

/// Records written pages of one machine.
#[derive(Debug)]
pub struct DirtyTracker {
    memory: Memory,
    slots: Arc<Slots>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    on: bool,
    record: Record,
    scratch: Vec<u64>,
}

impl DirtyTracker {
    /// A tracker over KVM's log that is off; `manual` if the log is cleared by a request of its own.
    pub fn with_log(vm: Arc<VmFd>, memory: Memory, slots: Arc<Slots>, manual: bool) -> Self {
        Self::new(memory, slots, Record::Log(Log::new(vm, manual)))
    }

    /// A tracker over the vCPUs' rings that is off.
    pub fn with_rings(memory: Memory, slots: Arc<Slots>, rings: Arc<DirtyRings>) -> Self {
        Self::new(memory, slots, Record::Rings(rings))
    }

    fn new(memory: Memory, slots: Arc<Slots>, record: Record) -> Self {
        Self { memory, slots, state: Mutex::new(State { on: false, record, scratch: Vec::new() }) }
    }

    /// Starts to record. Idempotent.
    ///
    /// # Errors
    ///
    /// [`TrackError`] if KVM refuses.
    pub fn start(&self) -> Result<(), TrackError> {
        let mut state = self.lock();
        if state.on {
            return Ok(());
        }
        for region in self.memory.ram().iter() {
            (**region).bitmap().reset();
        }
        let lengths = self.memory.regions().iter().map(|region| region.bytes);
        match &mut state.record {
            Record::Log(log) => log.begin(lengths),
            Record::Rings(rings) => rings.begin(lengths).map_err(TrackError::Thread)?,
        }
        // Whoever records is ready before there is anything to record.
        state.on = true;
        if state.record.is_trusted()
            && let Err(error) = self.slots.log(true)
        {
            state.on = false;
            state.record.end()?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Stops recording. Idempotent.
    ///
    /// # Errors
    ///
    /// [`TrackError`] if KVM refuses.
    pub fn stop(&self) -> Result<(), TrackError> {
        let mut state = self.lock();
        if state.on {
            self.slots.log(false)?;
            state.record.end()?;
            (state.on, state.scratch) = (false, Vec::new());
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
        let State { on, record, scratch } = &mut *guard;
        if !*on {
            return Err(TrackError::Off);
        }
        if let Record::Rings(rings) = record {
            rings.collect();
        }
        let mut base = 0;
        for (slot, region) in (0u32..).zip(self.memory.ram().iter()) {
            scratch.clear();
            scratch.resize(words(region.len()), 0);
            match record {
                Record::Log(log) => log.collect(slot, scratch, paused)?,
                Record::Rings(rings) => rings.take(slot, scratch),
            }
            // Devices write through the host's mapping, which KVM does not see. Their bitmap is read after the log and
            // forgotten at once: a later write sets it again.
            let written_by_devices = (**region).bitmap().get_and_reset();
            for (index, (word, device_word)) in scratch.iter().zip(written_by_devices).enumerate() {
                insert_bits(into, base + index as u64 * 64, word | device_word);
            }
            base += region.len() / PAGE_BYTES;
        }
        if let Record::Rings(rings) = record {
            // Last, since it may find out that too little was recorded.
            if rings.finish(paused)? {
                into.insert_range(0..pages);
            }
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
        match &mut self.lock().record {
            Record::Log(log) => log.before_run()?,
            Record::Rings(rings) => rings.before_run()?,
        }
        Ok(())
    }

    /// Bytes per second that each vCPU dirtied before the last collection; empty if nobody knows.
    pub fn vcpu_rates(&self) -> Vec<f64> {
        match &self.lock().record {
            Record::Log(_) => Vec::new(),
            Record::Rings(rings) => rings.rates(),
        }
    }

    /// What went wrong with recording, since the machine was made, so that more was reported than was written.
    pub fn warning(&self) -> Option<&'static str> {
        (!self.lock().record.is_trusted()).then_some(OVERRUN)
    }

    #[cfg(test)]
    pub(crate) fn cut_short(&self) {
        if let Record::Rings(rings) = &self.lock().record {
            rings.cut_short();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for DirtyTracker {
    fn drop(&mut self) {
        // A thread may still harvest.
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if state.on
            && let Err(error) = state.record.end()
        {
            tracing::debug!(%error, "the dirty rings of a machine that ends");
        }
    }
}

/// Sets 64 bits from `first`. Regions are multiples of a MiB, so that `first` is a multiple of 64.
fn insert_bits(into: &mut Bitmap, first: u64, bits: u64) {
    if bits != 0 {
        into.insert_word(first / 64, bits);
    }
}
