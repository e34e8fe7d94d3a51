//! Blocks that arrive after the guest has begun to run (post-copy).
//!
//! The block device asks before it starts a request; a request that touches a missing block is kept until the block is
//! there. So reads, writes and discards alike find the block in place, and nothing that arrives late can overwrite what the
//! guest has written.
//!
//! Storing a block must never wait for a page: the thread that stores it may be the one that brings pages. The device sees to
//! it that its requests have their pages before the kernel takes a lock of the file for them.

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::guest::{BLOCK_BYTES, BlockWriter, GuestError, GuestResult, Missing};
use migration::page::Bitmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Image;
use super::transfer::Writer;

/// What one disk lacks.
#[derive(Debug)]
pub struct LateBlocks {
    image: Arc<Image>,
    /// Cleared when all is there, so that a disk that has everything pays one load a request.
    any: AtomicBool,
    state: Mutex<State>,
    /// Held while a block is stored, so that no block is stored twice.
    writer: Mutex<Slot>,
    wanted: EventFd,
    arrived: EventFd,
}

#[derive(Debug)]
struct State {
    missing: Bitmap,
    wanted: Vec<u64>,
}

/// The writer exists from the first block to the end.
#[derive(Default)]
struct Slot(Option<Writer>);

impl std::fmt::Debug for Slot {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(if self.0.is_some() { "Slot(open)" } else { "Slot(closed)" })
    }
}

impl LateBlocks {
    /// `missing` will arrive.
    ///
    /// # Errors
    ///
    /// If no descriptor is left.
    pub fn new(image: Arc<Image>, missing: Bitmap) -> GuestResult<Self> {
        let event = || {
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|error| {
                GuestError::new(format!(
                    "{}: no event descriptor: {error}; raise the limit of open files",
                    image.describe()
                ))
            })
        };
        let (wanted, arrived) = (event()?, event()?);
        let any = AtomicBool::new(!missing.is_empty());
        let state = Mutex::new(State { missing, wanted: Vec::new() });
        Ok(Self { image, any, state, writer: Mutex::default(), wanted, arrived })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Becomes readable, again and again, when blocks have arrived; never read.
    pub fn arrived_fd(&self) -> RawFd {
        self.arrived.as_raw_fd()
    }

    /// Whether blocks may still be stored from outside the guest.
    pub fn is_open(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Whether `length` bytes at `offset` touch a missing block. With `ask`, those blocks are asked for.
    pub fn lacks(&self, offset: u64, length: u64, ask: bool) -> bool {
        if length == 0 || !self.is_open() {
            return false;
        }
        let mut state = self.state();
        let last = offset.saturating_add(length - 1) / BLOCK_BYTES;
        let (mut from, mut lacking) = (offset / BLOCK_BYTES, false);
        while let Some(run) = state.missing.next_run(from, u64::MAX).filter(|run| run.start <= last) {
            lacking = true;
            from = run.end;
            if !ask {
                break;
            }
            state.wanted.extend(run.start..run.end.min(last + 1));
        }
        if lacking && ask {
            let _ = self.wanted.write(1);
        }
        lacking
    }

    fn store(&self, block: u64, data: Option<&[u8]>) -> GuestResult<()> {
        let mut slot = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.state().missing.contains(block) {
            return Ok(());
        }
        if slot.0.is_none() {
            slot.0 = Some(Writer::new(Arc::clone(&self.image))?);
        }
        if let Some(writer) = &mut slot.0 {
            match data {
                Some(data) => writer.write(block, data)?,
                None => writer.zero(block..block + 1)?,
            }
            writer.flush(false)?;
        }
        self.state().missing.remove(block);
        let _ = self.arrived.write(1);
        Ok(())
    }
}

impl Missing for LateBlocks {
    fn ready(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.wanted.as_raw_fd()) }
    }

    fn wanted(&self, into: &mut Vec<u64>) -> GuestResult<()> {
        // Cleared first: what is asked for meanwhile makes it readable again.
        let _ = self.wanted.read();
        into.append(&mut self.state().wanted);
        Ok(())
    }

    fn fill(&self, first: u64, data: &[u8]) -> GuestResult<()> {
        (first..).zip(data.chunks(BLOCK_BYTES as usize)).try_for_each(|(block, data)| self.store(block, Some(data)))
    }

    fn fill_zero(&self, range: Range<u64>) -> GuestResult<()> {
        range.into_iter().try_for_each(|block| self.store(block, None))
    }

    fn finish(&self) -> GuestResult<()> {
        let mut slot = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut writer) = slot.0.take() {
            writer.flush(true)?;
        }
        self.state().missing.clear();
        self.any.store(false, Ordering::Release);
        let _ = self.arrived.write(1);
        Ok(())
    }
}
