//! Post-copy: the machine runs here before all of it is here.
//!
//! ```text
//! Precopy ──PostcopyPrepare, list──> forget, attach the session's channels ─> PostcopyReady
//! Switchover: list of what became dirty since, State ─> expect, session begins ─> restore, Prepared, Commit
//!                                                             │
//!                            ┌─> supervised: faults, pushes ──┴─> everything here ─> Complete ─> Verify
//!                            ├── link lost: the guest stands at the next missing page; wait for the source ──┐
//!                            │<── fault channel with the same token, list of what is still missing ──────────┘
//!                            └── the source does not come back, or this end breaks: the guest is stopped for good, and
//!                                what was lost is said
//! ```

use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use super::link::{Link, SILENCE};
use super::outcome::DestinationError;
use super::supervise::{Ending, Supervised};
use super::verify::Verify;
use crate::guest::MachineLayout;
use crate::transport::tcp::TICK;

/// The machine runs here.
pub(super) struct Postcopy {
    link: Link,
    supervised: Supervised,
    layout: MachineLayout,
    resume: Duration,
}

impl Postcopy {
    pub(super) fn new(link: Link, supervised: Supervised, layout: MachineLayout, resume: Duration) -> Self {
        Self { link, supervised, layout, resume }
    }

    pub(super) fn run(mut self) -> Result<Verify, DestinationError> {
        let ending = loop {
            match self.supervised.ending.recv_timeout(TICK) {
                Ok(ending) => break ending,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    break Ending::Lost("the supervisor of post-copy died: this is a bug".to_owned());
                }
            }
        };
        match ending {
            Ending::Complete(Some(channel)) => {
                self.link.control = *channel;
                // As patient as the control channel that it now is: digests may be long in coming on a busy source.
                self.link.control.set_patience(SILENCE);
                Ok(Verify::new(self.link, self.layout, self.resume, None))
            }
            Ending::Complete(None) => {
                let warning = "everything has arrived, but the source was not there any more to verify it".to_owned();
                Ok(Verify::new(self.link, self.layout, self.resume, Some(warning)))
            }
            Ending::Lost(reason) => {
                self.link.end();
                Err(DestinationError::Lost { reason })
            }
            Ending::Failed => {
                self.link.end();
                Err(DestinationError::Lost { reason: "post-copy was ended by this end: this is a bug".to_owned() })
            }
        }
    }
}
