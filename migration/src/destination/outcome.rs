//! How it ended at the destination.

use std::time::Duration;

use crate::guest::MachineLayout;
use crate::report::Verification;

/// The machine arrived and runs here.
#[derive(Clone, Debug)]
pub struct Received {
    /// What was received.
    pub layout: MachineLayout,
    /// From the arrival of Commit until the guest ran.
    pub resume: Duration,
    /// What was checked after the resume, as far as the source stayed for it.
    pub verification: Verification,
    /// Why the verification is not complete or not good, if so. The machine runs here all the same.
    pub warning: Option<String>,
}

/// Why no machine arrived, or not all of it. In every case it does not run here.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// The link was lost, or either end gave up, before Commit arrived: the machine never ran here.
    #[error("the machine was not taken over and does not run here: {reason}")]
    NotCommitted {
        /// What happened instead, and what to do.
        reason: String,
    },
    /// It ran here by post-copy, and a part of it will never arrive: it was stopped, and not discarded.
    #[error("the machine was taken over, but not all of it arrived: {reason}")]
    Lost {
        /// What is missing and why, and what to do.
        reason: String,
    },
}
