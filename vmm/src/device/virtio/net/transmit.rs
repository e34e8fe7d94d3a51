//! From the guest into the tap.

use super::announce::{Announcer, LEARNED_BYTES};
use super::receive::{Batch, Passed};
use super::{BATCH, FRAME_BYTES_MAX, HEADER_BYTES, Tap};
use crate::device::virtio::{Chain, Segment, VirtQueue};

/// A frame in which a guest speaks of its addresses is no longer than this, options and padding included.
const SPEAKS_OF_ITSELF_BYTES: usize = HEADER_BYTES + 128;

/// The transmit queue.
#[derive(Default)]
pub struct Transmit {
    queue: Option<VirtQueue>,
    chain: Chain,
    parts: Vec<libc::iovec>,
}

// SAFETY: the parts point into guest RAM, see `Segment`, and are only used within a call.
unsafe impl Send for Transmit {}

impl Transmit {
    /// Serves a queue that the driver has set up.
    pub fn start(&mut self, queue: Option<VirtQueue>) {
        self.queue = queue;
    }

    /// Forgets the queue.
    pub fn stop(&mut self) {
        self.queue = None;
    }

    /// The live queue.
    pub fn queue(&self) -> Option<&VirtQueue> {
        self.queue.as_ref()
    }

    /// Sends a batch of frames. What the tap does not take is dropped, as on any network.
    pub fn batch(&mut self, tap: &Tap, announcer: &Announcer, passed: &mut Passed) -> Batch {
        let Some(queue) = &mut self.queue else { return Batch::Empty };
        queue.mute();
        let mut ended = Batch::Full;
        for _ in 0..BATCH {
            if !queue.pop(&mut self.chain) {
                if queue.listen() {
                    continue;
                }
                ended = Batch::Empty;
                break;
            }
            let bytes = Chain::bytes(&self.chain.readable);
            if bytes <= HEADER_BYTES || bytes > FRAME_BYTES_MAX {
                passed.dropped += 1;
            } else {
                if bytes <= SPEAKS_OF_ITSELF_BYTES {
                    let mut frame = [0; LEARNED_BYTES];
                    let length = Chain::copy_out(&self.chain.readable, HEADER_BYTES, &mut frame);
                    announcer.learn(tap.mac(), &frame[..length]);
                }
                self.parts.clear();
                let segments = self.chain.readable.iter().filter(|segment| segment.bytes > 0);
                self.parts.extend(segments.map(Segment::iovec));
                // SAFETY: the parts are guest RAM, which the queue keeps mapped.
                match unsafe { tap.write(&self.parts) } {
                    Ok(()) => {
                        passed.frames += 1;
                        passed.bytes += (bytes - HEADER_BYTES) as u64;
                    }
                    Err(error) => {
                        tracing::debug!(network = tap.id(), %error, "the tap did not take a frame");
                        passed.dropped += 1;
                    }
                }
            }
            queue.push_used(self.chain.head, 0);
        }
        queue.signal();
        ended
    }
}
