//! How the threads of one migration are told to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::control::Control;

/// Raised to make every thread of one migration stop at its next [`TICK`](super::tcp::TICK); a cancelled [`Control`]
/// raises it too.
#[derive(Clone, Default)]
pub struct Stop {
    raised: Arc<AtomicBool>,
    control: Control,
}

impl Stop {
    /// Not raised, unless `control` is cancelled.
    pub fn new(control: &Control) -> Self {
        Self { raised: Arc::default(), control: control.clone() }
    }

    /// Raises it, for good.
    pub fn raise(&self) {
        self.raised.store(true, Ordering::SeqCst);
    }

    /// Whether it was raised.
    pub fn is_raised(&self) -> bool {
        self.raised.load(Ordering::SeqCst) || self.control.is_cancelled()
    }
}
