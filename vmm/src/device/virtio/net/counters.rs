//! What passes through a card, counted.

use std::sync::atomic::AtomicU64;

/// What passed through a card since the process started.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Bytes received by the guest.
    pub receive_bytes: AtomicU64,
    /// Frames received by the guest.
    pub receive_frames: AtomicU64,
    /// Bytes sent by the guest.
    pub transmit_bytes: AtomicU64,
    /// Frames sent by the guest.
    pub transmit_frames: AtomicU64,
    /// Frames of either direction that could not be delivered.
    pub dropped_frames: AtomicU64,
    /// How often the guest said that it has announced itself.
    pub announced: AtomicU64,
}
