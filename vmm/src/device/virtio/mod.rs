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
use registers::Registers;
use state::{QueueStateV1, TransportStateV1};
use unit::Unit;
use worker::{Backend, Worker};

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

/// Feature bits of every device (virtio 1.2, section 6).
mod feature {
    /// Descriptors that point to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications and interrupts only at an index that the other side asked for.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// What every device here offers.
    pub const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}
