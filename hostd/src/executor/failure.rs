//! How an attempt ends that does not end the migration.

use super::ExecutorError;
use crate::pool::PeerError;

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

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
}
