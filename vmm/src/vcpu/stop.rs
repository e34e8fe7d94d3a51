//! Why a machine stops by itself.

use std::fmt;

/// Why a machine stopped by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The guest turned the machine off, or asked for a reset.
    Guest(String),
    /// The guest, or KVM, cannot go on.
    Failure(String),
}

impl fmt::Display for StopReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Guest(reason) | Self::Failure(reason)) = self;
        formatter.write_str(reason)
    }
}
