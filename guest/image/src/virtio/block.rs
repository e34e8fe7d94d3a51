//! The block device (Virtio 1.2, 5.2): requests of up to a buffer's size that are queued, and polled for later.

use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

use super::hal::Hal;
use super::{Device, Unusable};

const QUEUE: u16 = 0;
/// Descriptors; a request takes three.
const DESCRIPTORS: usize = 64;
/// Requests in flight.
pub const REQUESTS: usize = 8;
const SECTOR_BYTES: u64 = 512;

const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const STATUS_OK: u8 = 0;
/// What the status is before the device writes it.
const STATUS_NONE: u8 = 0xff;

/// What to do with the buffer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read from this byte address on.
    Read(u64),
    /// Write to this byte address on.
    Write(u64),
    /// Make everything written durable; the buffer is not used.
    Flush,
}

/// One request's memory, which the device reaches while it is in flight.
struct Request {
    header: [u8; 16],
    buffer: Vec<u8>,
    status: [u8; 1],
    operation: Operation,
}

impl Request {
    /// The request as the queue wants it: what the device reads, and what it writes.
    fn parts<'a>(&'a mut self, read: &mut Vec<&'a [u8]>, write: &mut Vec<&'a mut [u8]>) {
        read.push(&self.header);
        match self.operation {
            Operation::Read(_) => write.push(&mut self.buffer),
            Operation::Write(_) => read.push(&self.buffer),
            Operation::Flush => {}
        }
        write.push(&mut self.status);
    }
}

/// Bytes of the disk, both halves of the same moment.
fn capacity(device: &Device) -> Result<u64, Unusable> {
    let halves = || -> virtio_drivers::Result<(u32, u32)> {
        Ok((device.transport.read_config_space(0)?, device.transport.read_config_space(4)?))
    };
    let (low, high) = device.transport.read_consistent(halves)?;
    Ok((u64::from(low) | u64::from(high) << 32).saturating_mul(SECTOR_BYTES))
}

/// The driver.
pub struct Block {
    device: Device,
    queue: VirtQueue<Hal, DESCRIPTORS>,
    /// Never moved: the vector has its length from the start.
    requests: Vec<Request>,
    /// Which request each chain of descriptors belongs to.
    owners: [usize; DESCRIPTORS],
    free: Vec<usize>,
    unsent: bool,
    read_only: bool,
    can_flush: bool,
}

impl Block {
    /// Sets the device up with buffers of `buffer_bytes`.
    pub fn new(mut device: Device, buffer_bytes: usize) -> Result<Self, Unusable> {
        let features = device.negotiate(FEATURE_READ_ONLY | FEATURE_FLUSH)?;
        capacity(&device)?;
        let queue = VirtQueue::new(&mut device.transport, QUEUE, false, false)?;
        device.transport.finish_init();
        let request = || {
            let buffer = vec![0; buffer_bytes];
            Request { header: [0; 16], buffer, status: [STATUS_NONE], operation: Operation::Flush }
        };
        let mut block = Self {
            device,
            queue,
            requests: (0..REQUESTS).map(|_| request()).collect(),
            owners: [0; DESCRIPTORS],
            free: (0..REQUESTS).collect(),
            unsent: false,
            read_only: features & FEATURE_READ_ONLY != 0,
            can_flush: features & FEATURE_FLUSH != 0,
        };
        super::set_interrupts(&mut block.queue, false);
        Ok(block)
    }

    /// Bytes of the disk, as the device says now: it may have been enlarged.
    pub fn bytes(&self) -> u64 {
        // It could be read when the device was set up.
        capacity(&self.device).unwrap_or(0)
    }

    /// Whether it refuses writes.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether it has a write cache to flush.
    pub fn can_flush(&self) -> bool {
        self.can_flush
    }

    /// Whether a request can be queued.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Queues a request, whose number is returned; `fill` is called with its buffer before. `None` if there is no room.
    pub fn submit(&mut self, operation: Operation, fill: impl FnOnce(&mut [u8])) -> Option<usize> {
        let index = self.free.pop()?;
        let request = &mut self.requests[index];
        let (kind, address) = match operation {
            Operation::Read(address) => (TYPE_IN, address),
            Operation::Write(address) => (TYPE_OUT, address),
            Operation::Flush => (TYPE_FLUSH, 0),
        };
        request.operation = operation;
        request.status = [STATUS_NONE];
        request.header = [0; 16];
        request.header[..4].copy_from_slice(&kind.to_le_bytes());
        request.header[8..].copy_from_slice(&(address / SECTOR_BYTES).to_le_bytes());
        fill(&mut request.buffer);

        let (mut read, mut write) = (Vec::with_capacity(2), Vec::with_capacity(2));
        request.parts(&mut read, &mut write);
        // SAFETY: the request stays where it is, and is not touched before `poll` has popped it: its number is not in `free`.
        if let Ok(token) = unsafe { self.queue.add(&read, &mut write) } {
            self.owners[usize::from(token)] = index;
            self.unsent = true;
            Some(index)
        } else {
            // There are three descriptors for each request.
            self.free.push(index);
            None
        }
    }

    /// The next request that is over, by its number: `handle` gets its buffer and whether it succeeded.
    pub fn poll<R>(&mut self, handle: impl FnOnce(usize, bool, &[u8]) -> R) -> Option<R> {
        let token = self.queue.peek_used()?;
        let index = *self.owners.get(usize::from(token))?;
        let request = &mut self.requests[index];
        let (mut read, mut write) = (Vec::with_capacity(2), Vec::with_capacity(2));
        request.parts(&mut read, &mut write);
        // SAFETY: the same buffers that `submit` added under this token.
        unsafe { self.queue.pop_used(token, &read, &mut write) }.ok()?;
        self.free.push(index);
        let request = &self.requests[index];
        Some(handle(index, request.status == [STATUS_OK], &request.buffer))
    }

    /// Before a round: takes note of an interrupt.
    pub fn acknowledge(&mut self) {
        self.device.acknowledge();
    }

    /// After a round: starts what was queued.
    pub fn finish(&mut self) {
        if self.unsent {
            self.unsent = false;
            self.device.notify(&self.queue, QUEUE);
        }
    }

    /// Switches the interrupt on or off, and says whether a request is over already.
    pub fn set_interrupts(&mut self, enable: bool) -> bool {
        super::set_interrupts(&mut self.queue, enable)
    }
}
