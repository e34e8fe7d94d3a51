//! From the tap into the guest.

use std::collections::VecDeque;
use std::io;

use super::{BATCH, FRAME_BYTES_MAX, HEADER_BYTES, Tap, feature};
use crate::device::virtio::{Chain, Segment, VirtQueue};
use crate::memory::GuestRam;

/// Where `num_buffers` lies in the header (virtio 1.2, section 5.1.6).
const NUM_BUFFERS: usize = 10;

/// Why a batch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batch {
    /// The tap has nothing more.
    Empty,
    /// The guest has no buffers left: the tap need not be looked at before it has.
    Starved,
    /// There may be more.
    Full,
    /// The tap is gone.
    Gone,
}

/// Frames and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Frames delivered.
    pub frames: u64,
    /// Their bytes, without the header.
    pub bytes: u64,
    /// Frames that could not be delivered.
    pub dropped: u64,
}

/// The receive queue, and buffers that were taken from it for frames to come.
#[derive(Default)]
pub struct Receive {
    queue: Option<VirtQueue>,
    /// Popped and not used yet, in order. One of them takes a frame; with mergeable buffers, as many as it needs.
    gathered: VecDeque<Chain>,
    /// Room in them.
    room: usize,
    mergeable: bool,
    /// Chains to be reused.
    spare: Vec<Chain>,
}

impl Receive {
    /// Serves a queue that the driver has set up.
    pub fn start(&mut self, queue: Option<VirtQueue>, features: u64) {
        self.queue = queue;
        self.mergeable = features & feature::MRG_RXBUF != 0;
    }

    /// Gives back what was gathered; the queue stands where its saved state says.
    pub fn pause(&mut self) {
        if let Some(queue) = &mut self.queue {
            queue.unpop(self.gathered.len() as u16);
        }
        self.spare.extend(self.gathered.drain(..));
        self.room = 0;
    }

    /// Forgets the queue.
    pub fn stop(&mut self) {
        self.pause();
        self.queue = None;
    }

    /// The live queue.
    pub fn queue(&self) -> Option<&VirtQueue> {
        self.queue.as_ref()
    }

    /// Delivers a batch of frames.
    pub fn batch(&mut self, tap: &Tap, ram: &GuestRam, passed: &mut Passed) -> Batch {
        let mut ended = Batch::Full;
        for _ in 0..BATCH {
            if !self.gather() {
                ended = Batch::Starved;
                break;
            }
            match self.frame(tap, ram, passed) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ended = Batch::Empty;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::error!(network = tap.id(), %error, "cannot read from the tap: was it deleted? The link goes down");
                    ended = Batch::Gone;
                    break;
                }
            }
        }
        if let Some(queue) = &mut self.queue {
            queue.signal();
        }
        ended
    }

    /// Asks the driver to tell when there are buffers again; true if there are some already.
    pub fn listen(&mut self) -> bool {
        self.queue.as_mut().is_some_and(VirtQueue::listen)
    }

    /// Takes buffers from the queue until the longest frame fits, or for drivers without mergeable buffers, one. False if
    /// there are none.
    fn gather(&mut self) -> bool {
        let Some(queue) = &mut self.queue else { return false };
        let (wanted_bytes, wanted_chains) =
            if self.mergeable { (FRAME_BYTES_MAX, usize::MAX) } else { (usize::MAX, 1) };
        while self.room < wanted_bytes && self.gathered.len() < wanted_chains {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.pop(&mut chain) {
                self.spare.push(chain);
                break;
            }
            let room = Chain::bytes(&chain.writable);
            if room < HEADER_BYTES {
                queue.refuse(chain.head);
                self.spare.push(chain);
                break;
            }
            self.room += room;
            self.gathered.push_back(chain);
        }
        !self.gathered.is_empty()
    }

    /// Reads one frame into the gathered buffers and shows them to the guest.
    fn frame(&mut self, tap: &Tap, ram: &GuestRam, passed: &mut Passed) -> io::Result<()> {
        // A byte of the host's own behind the guest's room tells a frame that does not fit from one that just does.
        let mut beyond = 0u8;
        let segments = self.gathered.iter().flat_map(|chain| &chain.writable).filter(|segment| segment.bytes > 0);
        let mut parts: Vec<libc::iovec> = segments.map(Segment::iovec).collect();
        parts.truncate(libc::UIO_MAXIOV as usize - 1);
        let room: usize = parts.iter().map(|part| part.iov_len).sum();
        parts.push(libc::iovec { iov_base: (&raw mut beyond).cast(), iov_len: 1 });
        // SAFETY: the parts are guest RAM, which `ram` keeps mapped, and the byte above.
        let length = unsafe { tap.read(&parts) }?;
        let Some(queue) = &mut self.queue else { return Ok(()) };
        if length > room || length <= HEADER_BYTES {
            // Part of it was written: the pages have changed, though the guest still owns nothing of them.
            self.gathered.iter().for_each(|chain| Chain::mark_dirty(ram, &chain.writable, usize::MAX));
            passed.dropped += 1;
            return Ok(());
        }
        let mut left = length;
        let mut used = 0;
        for chain in &self.gathered {
            if left == 0 {
                break;
            }
            let bytes = Chain::bytes(&chain.writable).min(left);
            Chain::mark_dirty(ram, &chain.writable, bytes);
            left -= bytes;
            used += 1;
        }
        Chain::copy_in(ram, &self.gathered[0].writable, NUM_BUFFERS, &(used as u16).to_le_bytes());
        left = length;
        for chain in self.gathered.drain(..used) {
            let room = Chain::bytes(&chain.writable);
            let bytes = room.min(left);
            left -= bytes;
            self.room -= room;
            queue.push_used(chain.head, bytes as u32);
            self.spare.push(chain);
        }
        passed.frames += 1;
        passed.bytes += (length - HEADER_BYTES) as u64;
        Ok(())
    }
}
