//! The migration's side of a disk: blocks read and written with many requests in flight.
//!
//! Buffers and ring exist only while a reader or writer does, so that a machine that stays pays nothing for them.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use migration::guest::{BLOCK_BYTES, BlockReader, BlockWriter, GuestError, GuestResult};

use super::{AlignedBuffer, Image, Ring};

/// Requests in flight.
const DEPTH: usize = 32;
/// Requests that are shown to the kernel at once while more are likely to follow.
const BATCH: usize = 4;
const BLOCK: usize = BLOCK_BYTES as usize;

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

/// One block on its way.
#[derive(Clone, Copy, Default)]
struct Slot {
    block: u64,
    /// Bytes of the block: fewer for the last one.
    length: usize,
    /// Bytes already moved, should the kernel have stopped short.
    done: usize,
    busy: bool,
}

/// Slots, their buffers, and the ring that moves them.
struct Transfer {
    /// Dropped, and with that closed, before the buffers that are registered with it.
    ring: Ring,
    buffers: AlignedBuffer,
    registered: bool,
    slots: [Slot; DEPTH],
    image: Arc<Image>,
    direction: Direction,
}

impl Transfer {
    fn new(image: Arc<Image>, direction: Direction) -> GuestResult<Self> {
        let failed = |error: io::Error| {
            GuestError::new(format!(
                "{}: cannot set up io_uring for the migration: {error}; is kernel.io_uring_disabled set, or the limit for locked memory low?",
                image.describe()
            ))
        };
        let ring = Ring::new(DEPTH as u32).map_err(failed)?;
        let mut buffers = AlignedBuffer::new(DEPTH * BLOCK).map_err(failed)?;
        // SAFETY: the buffers live in the same structure and are dropped after the ring.
        let registered = unsafe { ring.register_buffers(buffers.as_mut_ptr(), BLOCK, DEPTH) };
        Ok(Self { ring, buffers, registered, slots: [Slot::default(); DEPTH], image, direction })
    }

    fn failed(&self, block: u64, error: &io::Error) -> GuestError {
        let verb = match self.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        };
        GuestError::new(format!(
            "{}: cannot {verb} block {block} (64 KiB at byte {}): {error}; check the storage below the image and its free space",
            self.image.describe(),
            block * BLOCK_BYTES
        ))
    }

    /// Bytes of `block`.
    fn length(&self, block: u64) -> GuestResult<usize> {
        match self.image.bytes().checked_sub(block.saturating_mul(BLOCK_BYTES)) {
            Some(left) if left > 0 => Ok(left.min(BLOCK_BYTES) as usize),
            _ => Err(GuestError::new(format!(
                "{}: there is no block {block}, the disk has {}",
                self.image.describe(),
                self.image.layout().blocks()
            ))),
        }
    }

    fn free(&self) -> Option<usize> {
        self.slots.iter().position(|slot| !slot.busy)
    }

    fn buffer(&mut self, slot: usize) -> &mut [u8] {
        &mut self.buffers.bytes_mut()[slot * BLOCK..(slot + 1) * BLOCK]
    }

    /// Queues what is left of a slot.
    fn push(&mut self, index: usize) -> GuestResult<()> {
        let slot = self.slots[index];
        let start = self.buffers.as_mut_ptr().wrapping_add(index * BLOCK + slot.done);
        let (length, offset) = ((slot.length - slot.done) as u32, slot.block * BLOCK_BYTES + slot.done as u64);
        let (file, buffer) = (types::Fd(self.image.file().as_raw_fd()), index as u16);
        let entry: squeue::Entry = match (self.direction, self.registered) {
            (Direction::Read, true) => opcode::ReadFixed::new(file, start, length, buffer).offset(offset).build(),
            (Direction::Read, false) => opcode::Read::new(file, start, length).offset(offset).build(),
            (Direction::Write, true) => opcode::WriteFixed::new(file, start, length, buffer).offset(offset).build(),
            (Direction::Write, false) => opcode::Write::new(file, start, length).offset(offset).build(),
        };
        // SAFETY: the buffer lives until `drop` has waited for every request; a busy slot's part is touched by nobody else.
        unsafe { self.ring.push(&entry.user_data(index as u64)) }.map_err(|error| self.failed(slot.block, &error))
    }

    fn start(&mut self, index: usize, block: u64, length: usize) -> GuestResult<()> {
        self.slots[index] = Slot { block, length, done: 0, busy: true };
        self.push(index)?;
        if self.ring.unsubmitted() >= BATCH {
            self.ring.submit().map_err(|error| self.failed(block, &error))?;
        }
        Ok(())
    }

    /// Waits until a slot is done and frees it; its bytes stay until the slot is started again. `None`: nothing in flight.
    fn finish_one(&mut self) -> GuestResult<Option<usize>> {
        loop {
            let entry = self.ring.wait().map_err(|error| self.failed(0, &error))?;
            let Some(entry) = entry else { return Ok(None) };
            let index = entry.user_data() as usize;
            let slot = &mut self.slots[index];
            let error = match usize::try_from(entry.result()) {
                Ok(0) => io::Error::from(io::ErrorKind::UnexpectedEof),
                Ok(moved) => {
                    slot.done += moved;
                    if slot.done >= slot.length {
                        slot.busy = false;
                        return Ok(Some(index));
                    }
                    self.push(index)?;
                    continue;
                }
                Err(_) if matches!(-entry.result(), libc::EAGAIN | libc::EINTR) => {
                    self.push(index)?;
                    continue;
                }
                Err(_) => io::Error::from_raw_os_error(-entry.result()),
            };
            slot.busy = false;
            let block = slot.block;
            return Err(self.failed(block, &error));
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        // The kernel may still write into the buffers. If waiting fails, they are given up rather than freed too early.
        while self.ring.in_flight() > 0 {
            if self.ring.wait().is_err() {
                self.buffers.leak();
                return;
            }
        }
    }
}

/// Reads blocks.
pub struct Reader {
    transfer: Transfer,
}

impl Reader {
    /// With a queue of its own.
    ///
    /// # Errors
    ///
    /// If the ring cannot be made.
    pub fn new(image: Arc<Image>) -> GuestResult<Self> {
        Ok(Self { transfer: Transfer::new(image, Direction::Read)? })
    }
}

impl BlockReader for Reader {
    fn depth(&self) -> usize {
        DEPTH
    }

    fn submit(&mut self, block: u64) -> GuestResult<()> {
        let length = self.transfer.length(block)?;
        let index = self.transfer.free().ok_or_else(|| {
            GuestError::new(format!("{DEPTH} blocks are being read already: complete one before the next is submitted"))
        })?;
        self.transfer.start(index, block, length)
    }

    fn complete(&mut self, take: &mut dyn FnMut(u64, &[u8])) -> GuestResult<bool> {
        let Some(index) = self.transfer.finish_one()? else { return Ok(false) };
        let Slot { block, length, .. } = self.transfer.slots[index];
        take(block, &self.transfer.buffer(index)[..length]);
        Ok(true)
    }
}

/// Writes blocks.
pub struct Writer {
    transfer: Transfer,
}

impl Writer {
    /// With a queue of its own.
    ///
    /// # Errors
    ///
    /// If the ring cannot be made.
    pub fn new(image: Arc<Image>) -> GuestResult<Self> {
        Ok(Self { transfer: Transfer::new(image, Direction::Write)? })
    }

    /// Two writes of one block must land in the order in which they were queued, which a ring does not promise.
    fn settle(&mut self, blocks: &Range<u64>) -> GuestResult<()> {
        while self.transfer.slots.iter().any(|slot| slot.busy && blocks.contains(&slot.block)) {
            self.transfer.finish_one()?;
        }
        Ok(())
    }
}

impl BlockWriter for Writer {
    fn write(&mut self, block: u64, data: &[u8]) -> GuestResult<()> {
        let length = self.transfer.length(block)?;
        if data.len() != length {
            let disk = self.transfer.image.describe();
            return Err(GuestError::new(format!("{disk}: block {block} has {length} bytes, not {}", data.len())));
        }
        self.settle(&(block..block + 1))?;
        let index = loop {
            match self.transfer.free() {
                Some(index) => break index,
                None => self.transfer.finish_one()?,
            };
        };
        self.transfer.buffer(index)[..length].copy_from_slice(data);
        self.transfer.start(index, block, length)
    }

    fn zero(&mut self, blocks: Range<u64>) -> GuestResult<()> {
        let last = blocks.end.saturating_sub(1);
        if blocks.is_empty() {
            return Ok(());
        }
        let end = last * BLOCK_BYTES + self.transfer.length(last)? as u64;
        let bytes = blocks.start * BLOCK_BYTES..end;
        self.settle(&blocks)?;
        let image = Arc::clone(&self.transfer.image);
        match image.next_data(bytes.start) {
            Ok(data) if data.as_ref().is_none_or(|data| data.start >= bytes.end) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(self.transfer.failed(blocks.start, &error)),
        }
        match image.punch(bytes) {
            Ok(()) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                let zeroes = vec![0; BLOCK];
                for block in blocks {
                    let length = self.transfer.length(block)?;
                    self.write(block, &zeroes[..length])?;
                }
                Ok(())
            }
            Err(error) => Err(self.transfer.failed(blocks.start, &error)),
        }
    }

    fn flush(&mut self, durable: bool) -> GuestResult<()> {
        while self.transfer.finish_one()?.is_some() {}
        if durable {
            self.transfer.image.file().sync_data().map_err(|error| {
                GuestError::new(format!("{}: cannot flush: {error}", self.transfer.image.describe()))
            })?;
        }
        Ok(())
    }
}
