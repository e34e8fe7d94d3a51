//! The door of a host.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether machines may come to this host; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<AtomicBool>);

impl Gate {
    /// No machine may be made here or arrive.
    pub fn closed(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    pub(super) fn set(&self, closed: bool) {
        self.0.store(closed, Ordering::SeqCst);
    }
}
