//! Pages that the guest names as free, and that are then not sent.
//!
//! ```text
//! dirty log read ──> start ──> the guest names free pages, channels leave them out ──> stop ──> dirty log read ──> ...
//! ```
//!
//! A page that is left out keeps its old contents at the source and becomes zeroes at the destination. That is right as long as
//! the guest does not use it again; if it does, it writes to it, and the dirty log says so. So a page may be left out only if it
//! was named *after* the log was read the last time: what was named before may have been used and written since, that writing
//! is what the log has just told, and leaving the page out would lose it. Hence each round has a bitmap of its own, hints begin
//! after the log was read and end before it is read again ([`Dirty::collect`](super::round::Dirty::collect) ends them), and
//! the guest's side makes sure that no late one counts.

use std::time::{Duration, Instant};

use super::context::Context;
use super::job::MemoryWork;
use crate::error::{Doing, MigrationError};
use crate::guest::PAGE_BYTES;

/// Round 0, in which there is most to leave out, begins so much later if the guest takes so long to name it, at most.
const PATIENCE: Duration = Duration::from_millis(100);
/// But never by more than a quarter of what sending takes at this rate.
const QUICK_BYTES_PER_SECOND: u64 = 1 << 30;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(1);

impl Context {
    /// Asks for hints for a round whose pages were collected just now.
    pub(super) fn start_hints(&mut self, round: u32, work: &MemoryWork) -> Result<(), MigrationError> {
        // Images that are compared in full would differ in pages that nobody uses.
        if self.options.limits.compare_full || self.done.paused {
            return Ok(());
        }
        self.done.hinting = true;
        let asked = self.guest.start_free_page_hints(work.free()).doing("asking for free pages")?;
        if asked && round == 0 {
            let sending = Duration::from_secs(work.count() * PAGE_BYTES) / QUICK_BYTES_PER_SECOND as u32;
            let until = Instant::now() + PATIENCE.min(sending / 4);
            while Instant::now() < until && !self.guest.free_page_hints_are_over() {
                self.check_cancelled()?;
                std::thread::sleep(LOOK);
            }
        }
        Ok(())
    }

    /// Ends the hints of this round.
    pub(super) fn stop_hints(&self) -> Result<(), MigrationError> {
        if self.done.hinting {
            self.guest.stop_free_page_hints(false).doing("ending the hints of free pages")?;
        }
        Ok(())
    }

    /// No more hints are needed: the guest may use for something else what it has kept free.
    pub(super) fn finish_hints(&mut self) {
        if std::mem::take(&mut self.done.hinting)
            && let Err(error) = self.guest.stop_free_page_hints(true)
        {
            tracing::warn!(%error, "the guest may keep pages free that nobody asks for any more");
        }
    }
}
