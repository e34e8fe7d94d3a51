//! Virtio devices (virtio 1.2) over the memory-mapped transport.
//!
//! ```text
//! vCPU ──MMIO exit──> MmioTransport ──> Registers (status, features, queue set-up)
//!                                          │ activate, stop, reset: calls that return when done
//! vCPU ──ioeventfd──> notify ──────────> Worker: one thread a device ──> tap, io_uring
//! vCPU <──interrupt── interrupt <──────────┘ used rings, in guest memory
//! ```
//!
//! Whatever the guest writes into registers, rings and descriptors is taken as hostile: it is checked before it is used, and
//! a queue that breaks the rules is left alone and reported by `DEVICE_NEEDS_RESET`. The other devices go on.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::device::Line;
use crate::memory::GuestRam;

pub mod balloon;
pub mod block;
mod chain;
mod feature;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
#[cfg(test)]
mod hostile;
mod interrupt;
pub mod mmio;
mod model;
pub mod net;
mod queue;
mod registers;
mod state;
#[cfg(test)]
mod testing;
mod unit;
mod worker;

use chain::{Chain, Segment};
use interrupt::Interrupt;
use model::Model;
use queue::VirtQueue;
use state::{QueueStateV1, TransportStateV1};
use unit::Unit;
use worker::Backend;

/// What joins a device to its machine. The machine registers the descriptors with KVM; the device only uses them.
pub struct Wiring {
    /// Guest RAM. A clone shares the mapping and its bitmap of written pages.
    pub ram: GuestRam,
    /// The device's interrupt line.
    pub interrupt: Arc<dyn Line>,
    /// One a queue, non-blocking: registered as ioeventfd at [`mmio::QUEUE_NOTIFY`] of the window, 4 bytes wide, with the
    /// queue's number as the datamatch.
    pub notify: Vec<EventFd>,
}
