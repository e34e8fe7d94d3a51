//! The control queue (virtio 1.2, section 5.1.6.5): the guest's answer when it was asked to announce itself.
//!
//! What is known here of the guest's addresses is what was overheard. The guest knows them all, those of IPv6 and of its VLANs
//! among them: a driver that agreed to it (`VIRTIO_NET_F_GUEST_ANNOUNCE`, section 5.1.6.5.4) is asked by a bit of the link's
//! status and answers with a command once it has sent its own announcements.

use super::receive::Batch;
use super::{BATCH, space};
use crate::device::virtio::{Chain, VirtQueue};
use crate::memory::GuestRam;

/// `VIRTIO_NET_CTRL_ANNOUNCE`, `VIRTIO_NET_CTRL_ANNOUNCE_ACK`: the only command that any feature offered here knows.
const ANNOUNCED: [u8; 2] = [3, 0];
const OK: u8 = 0;
const ERROR: u8 = 1;

/// The control queue.
#[derive(Default)]
pub struct ControlQueue {
    queue: Option<VirtQueue>,
    chain: Chain,
}

impl ControlQueue {
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

    /// Answers a batch of commands; how often the guest says that it has announced itself is added to `announced`.
    pub fn batch(&mut self, ram: &GuestRam, announced: &mut u64) -> Batch {
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
            let mut command = [0; ANNOUNCED.len()];
            let length = Chain::copy_out(&self.chain.readable, 0, &mut command);
            let known = command[..length] == ANNOUNCED;
            if Chain::copy_in(ram, &self.chain.writable, 0, &[if known { OK } else { ERROR }]) == 0 {
                queue.refuse(self.chain.head);
                continue;
            }
            *announced += u64::from(known);
            queue.push_used(self.chain.head, 1);
        }
        queue.signal();
        ended
    }
}

/// Sets or clears the request in the link's status.
pub fn ask(config: &mut [u8], wanted: bool) {
    let status = &mut config[space::CONFIG_STATUS];
    *status = if wanted { *status | space::ANNOUNCE } else { *status & !space::ANNOUNCE };
}
