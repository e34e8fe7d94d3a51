//! What the guest does to a disk, counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// What the guest did to a disk since the process started.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Bytes written.
    pub write_bytes: AtomicU64,
    /// Requests answered, of any kind.
    pub requests: AtomicU64,
    /// Requests answered with an error.
    pub failed_requests: AtomicU64,
}

impl BlockCounters {
    /// Adds to one of the counters.
    pub(super) fn add(counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Ordering::Relaxed);
    }
}
