//! What keeps the machine busy. Each part does a small piece of work when it is called and says when it wants to be called
//! again, so that the network is looked at in between.

pub mod balloon;
pub mod churn;
pub mod cpu;
pub mod disk;
pub mod heartbeat;
pub mod memory;
pub mod rate;

use crate::time::{MICROSECOND, MILLISECOND};

/// How long one piece of work may take, in nanoseconds, apart from the page or block it is at.
pub const PIECE: u64 = 200 * MICROSECOND;

/// Work that is due more often than this is done in one go, in nanoseconds: each waking of the vCPU has its price.
pub const PAUSE: u64 = MILLISECOND;
