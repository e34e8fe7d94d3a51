//! The network card of a machine (virtio 1.2, section 5.1), over a tap.
//!
//! ```text
//! tap ──readv──> receive queue ──> guest          one frame a call, straight into the guest's buffers
//! guest ──> transmit queue ──writev──> tap ──> bridge
//! announce ──RARP, gratuitous ARP, neighbour advertisements──> tap ──> bridge
//! control queue <── the guest has announced itself as well, as it was asked
//! ```
//!
//! * `tap.rs`: the tap. `receive.rs`, `transmit.rs`: the two directions. `announce.rs`: frames that tell where a guest is.
//!   `control.rs`: the guest's answer when it was asked to do the same.
//! * `worker.rs`: the thread. `device.rs`: the card as the machine sees it; `state.rs`: its saved state;
//!   `space.rs`: its configuration space.
//!
//! Checksums and segmentation are left to the kernel where the guest's driver agrees: the header of each frame
//! (section 5.1.6) is the tap's own `virtio_net_hdr`, so that both ends speak of the same thing.
//!
//! A paused card leaves frames in the tap's queue; they are delivered after the resume.

mod announce;
mod control;
mod counters;
mod device;
mod receive;
mod space;
mod state;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod worker;

pub use counters::NetCounters;
pub use device::{Net, slot};
pub use tap::{Tap, TapError};

/// Number of queues: receive, transmit, control.
pub const QUEUES: usize = 3;

/// Descriptors in each queue.
const QUEUE_SIZE: u16 = 256;
/// The header before each frame (virtio 1.2, section 5.1.6), always with `num_buffers`.
const HEADER_BYTES: usize = 12;
/// Header and the longest frame: 64 KiB of IP after segmentation offload, Ethernet with a VLAN tag.
const FRAME_BYTES_MAX: usize = HEADER_BYTES + 18 + 65536;
/// Frames in one direction before the other has its turn.
const BATCH: usize = 64;

/// Feature bits (virtio 1.2, section 5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    pub const OFFERED: u64 = CSUM
        | GUEST_CSUM
        | MAC
        | GUEST_TSO4
        | GUEST_TSO6
        | GUEST_ECN
        | HOST_TSO4
        | HOST_TSO6
        | HOST_ECN
        | MRG_RXBUF
        | STATUS
        | CTRL_VQ
        | GUEST_ANNOUNCE;
}
