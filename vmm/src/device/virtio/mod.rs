//! Virtio devices (virtio 1.2) over the memory-mapped transport.

use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;

pub mod block;
pub mod mmio;
pub mod net;

/// What joins a device to its machine. The machine registers the descriptors with KVM; the device only uses them.
pub struct Wiring {
    /// Guest RAM. A clone shares the mapping and its bitmap of written pages.
    pub ram: GuestRam,
    /// Raises the device's interrupt line once (edge): registered as irqfd.
    pub interrupt: EventFd,
    /// One a queue, non-blocking: registered as ioeventfd at [`mmio::QUEUE_NOTIFY`] of the window, 4 bytes wide, with the
    /// queue's number as the datamatch.
    pub notify: Vec<EventFd>,
}
