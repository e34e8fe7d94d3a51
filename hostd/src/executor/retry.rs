//! Another attempt after a failure that may be gone by then.
//!
//! ```text
//!  attempt ── failed before Commit: link lost, peer away or busy ──► Retrying: 1 s, 2 s, 4 s ... 60 s ──► attempt
//!     │                                                                  └─ cancelled, guest ended ──► ended
//!     └── refused, does not converge, no attempts left ──► Failed
//! ```

use std::sync::Arc;
use std::time::Duration;

use super::source::wait_true;
use super::{Active, Executor, ExecutorError};
use crate::api::types::{FailedAttempt, MigrationStage};
use crate::clock::unix_ms;
use crate::machine::entry::Entry;
use crate::pool::PeerError;

/// First and longest pause before another attempt.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Most attempts after the first one that may be asked for.
pub const RETRIES_MAX: u32 = 100;

/// How an attempt ended, if it did not end the migration.
pub(super) struct Failure {
    /// Why.
    pub(super) error: String,
    /// The next attempt may succeed although nobody has changed anything.
    pub(super) transient: bool,
}

impl From<ExecutorError> for Failure {
    fn from(error: ExecutorError) -> Self {
        Self { transient: transient(&error), error: crate::machine::chain(&error) }
    }
}

/// Whether a refusal is about the moment and not about the machine, the hosts or their rules.
fn transient(error: &ExecutorError) -> bool {
    match error {
        ExecutorError::Overlap { .. } => true,
        ExecutorError::Peer(PeerError::Unreachable { .. } | PeerError::Silent { .. }) => true,
        ExecutorError::Peer(PeerError::Refused { problem, .. }) => {
            problem.status == 503 || problem.kind == "urn:headroom:problem:still-migrating"
        }
        _ => false,
    }
}

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
    use crate::api::types::Problem;

    fn refused(status: u16, kind: &str) -> ExecutorError {
        let kind = format!("urn:headroom:problem:{kind}");
        let problem = Problem { kind, title: String::new(), status, detail: String::new() };
        PeerError::Refused { host: "b1".into(), problem }.into()
    }

    #[test]
    fn only_what_may_change_by_itself_is_tried_again() {
        assert!(transient(&refused(503, "busy")));
        assert!(transient(&refused(409, "still-migrating")));
        for (status, kind) in
            [(403, "denied"), (507, "no-room"), (409, "host-draining"), (409, "processor-lacks-features")]
        {
            assert!(!transient(&refused(status, kind)), "{kind}");
        }
        let patience = Duration::from_secs(3);
        let silent = PeerError::Silent { host: "b1".into(), address: "127.0.0.1:1".parse().unwrap(), patience };
        assert!(transient(&silent.into()));
    }

    #[test]
    fn pauses_double_up_to_a_minute() {
        let pauses: Vec<u64> = (1..=9).map(|attempt| pause_before(attempt).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(pause_before(u32::MAX), PAUSE.1);
    }
}
