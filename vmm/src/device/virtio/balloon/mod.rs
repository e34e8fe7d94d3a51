//! The memory balloon of a machine (virtio 1.2, section 5.5): the guest gives pages back.
//!
//! ```text
//! operator ──target──> num_pages ──config change──> guest ──inflate queue──> worker ──MADV_DONTNEED──> host
//!                                                   guest ──reporting queue─> worker ──MADV_DONTNEED──> host    (at once)
//! migration ─start──> command id ──config change──> guest ──hint queue─────> worker ──page numbers──> migration
//! ```
//!
//! * `reclaim.rs`: lists of page frames, checked, sorted, and made into runs.
//! * `hint.rs`: which hints count, a state machine without I/O. `statistics.rs`: what the guest tells of its memory.
//! * `worker.rs`: the thread. `device.rs`: the balloon as the machine sees it; `state.rs`: its saved state.
//!
//! A page that was inflated or reported reads as zeroes from then on, whatever happens at the same time:
//!
//! * Pre-copy: giving a page back counts as a write of the machine, after the fact. So it is sent once more, as zeroes.
//! * Post-copy: see `memory::give_back`; what is still on its way does not come back.
//!
//! Free page hints are different: the guest may use such a page again at any moment, without a word. Nothing is given back for
//! them; a migration leaves them out as long as the dirty log says nothing else (`migration::source`).

mod device;
mod hint;
mod reclaim;
mod state;
mod statistics;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{Balloon, slot};
pub use statistics::Statistics;
#[cfg(feature = "fuzzing")]
pub(super) use worker::{BalloonWorker, ConfigSpace, Parts};

/// Number of queues: inflate, deflate, statistics, free page hints, free page reports (section 5.5.2).
pub const QUEUES: usize = 5;

/// Bytes of a page of the balloon, whatever pages the guest has (section 5.5.6).
const PAGE_BYTES: u64 = 4096;
/// Pages of a MiB.
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_BYTES;
/// Descriptors in each queue.
const QUEUE_SIZE: u16 = 128;
/// Chains of one queue before the others have their turn.
const BATCH: usize = 32;

/// Index of the queues. The later ones have these numbers because the features of all that come before are always offered.
mod queue {
    pub const INFLATE: usize = 0;
    #[cfg(test)]
    pub const DEFLATE: usize = 1;
    pub const STATISTICS: usize = 2;
    pub const HINTS: usize = 3;
    pub const REPORTS: usize = 4;
}

/// Feature bits (section 5.5.3).
mod feature {
    pub const STATISTICS: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const HINTS: u64 = 1 << 3;
    pub const POISON: u64 = 1 << 4;
    pub const REPORTS: u64 = 1 << 5;
}

/// Offsets of fields of the configuration space (section 5.5.4), each 32 bits wide.
mod field {
    pub const TARGET: usize = 0;
    pub const ACTUAL: usize = 4;
    pub const COMMAND: usize = 8;
    pub const POISON: usize = 12;
    pub const BYTES: usize = 16;
}
