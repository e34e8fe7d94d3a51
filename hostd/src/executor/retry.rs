//! Another attempt after a failure that may be gone by then.
//!
//! ```text
//!  attempt ── failed before Commit: link lost, peer away or busy ──► Retrying: 1 s, 2 s, 4 s ... 60 s ──► attempt
//!     │                                                                  └─ cancelled, guest ended ──► ended
//!     └── refused, does not converge, no attempts left ──► Failed
//! ```

use std::sync::Arc;
use std::time::Duration;

use super::failure::Failure;
use super::{Active, Executor};
use crate::api::types::{FailedAttempt, MigrationStage};
use crate::clock::unix_ms;
use crate::flag::wait_true;
use crate::machine::entry::Entry;

/// First and longest pause before another attempt.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

fn pause_before(attempt: u32) -> Duration {
    PAUSE.0.saturating_mul(1 << attempt.saturating_sub(1).min(16)).min(PAUSE.1)
}

impl Executor {
    /// After a failed attempt: ends the migration, or waits for the next one. True if that is to begin.
    pub(super) async fn wait_for_another(&self, active: &Arc<Active>, entry: &Arc<Entry>, failure: Failure) -> bool {
        let Failure { error, transient } = failure;
        if *active.cancelled.borrow() {
            self.stay(active, entry, MigrationStage::Cancelled, Some(error)).await;
            return false;
        }
        let migration = active.get();
        if !transient || migration.retries_left == 0 || entry.process().is_none() {
            self.stay(active, entry, MigrationStage::Failed, Some(error)).await;
            return false;
        }
        let pause = pause_before(migration.attempt);
        let detail =
            format!("attempt {} failed: {error}; the next one begins in {} s", migration.attempt, pause.as_secs());
        self.inner.audit.noted("migration-retry", &migration.object(), &detail);
        self.update(active, |migration| {
            let at_unix_ms = unix_ms();
            migration.stage = MigrationStage::Retrying;
            migration.failures.push(FailedAttempt { at_unix_ms, error });
            migration.attempt += 1;
            migration.retries_left -= 1;
            migration.retry_at_unix_ms = Some(at_unix_ms + pause.as_millis() as u64);
            (migration.progress, migration.report, migration.error) = (None, None, None);
        });
        self.wait_for_its_time(active, entry).await
    }

    /// Waits until the next attempt is to begin; also after a restart of hostd.
    pub(super) async fn wait_for_its_time(&self, active: &Arc<Active>, entry: &Arc<Entry>) -> bool {
        let left = active.get().retry_at_unix_ms.unwrap_or(0).saturating_sub(unix_ms());
        let mut cancelled = active.cancelled.subscribe();
        let ended = async {
            if let Some(process) = entry.process() {
                let _ = process.watch().wait_for(Option::is_some).await;
            }
        };
        let (stage, why) = tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(left)) => {
                self.update(active, |migration| {
                    migration.stage = MigrationStage::Queued;
                    migration.retry_at_unix_ms = None;
                });
                return true;
            }
            () = wait_true(&mut cancelled) => (MigrationStage::Cancelled, "cancelled between two attempts"),
            () = ended => (MigrationStage::Failed, "the machine's VMM ended between two attempts"),
        };
        self.update(active, |migration| migration.retry_at_unix_ms = None);
        self.stay(active, entry, stage, Some(why.to_owned())).await;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_minute() {
        let pauses: Vec<u64> = (1..=9).map(|attempt| pause_before(attempt).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(pause_before(u32::MAX), PAUSE.1);
    }
}
