//! What a request gets to hear that the executor refuses.

use super::ExecutorError;
use crate::api::problem::Failure;

impl From<ExecutorError> for Failure {
    fn from(error: ExecutorError) -> Self {
        let (status, kind) = match &error {
            ExecutorError::NoPeer(..) | ExecutorError::Here(_) => (400, "wrong-destination"),
            ExecutorError::Unknown(_) => (404, "no-such-migration"),
            ExecutorError::Used(_) => (409, "migration-exists"),
            ExecutorError::Undecided { .. } => (409, "undecided"),
            ExecutorError::NotNow { .. } => (409, "wrong-stage"),
            ExecutorError::Draining(_) => (409, "host-draining"),
            ExecutorError::Busy { .. } => (503, "busy"),
            ExecutorError::Overlap { .. } => (409, "still-migrating"),
            ExecutorError::Processor { .. } => (409, "processor-lacks-features"),
            ExecutorError::Load { .. } => (507, "no-room"),
            ExecutorError::Machine(_) | ExecutorError::Peer(_) => (0, ""),
            ExecutorError::Store(_) | ExecutorError::Random(_) => (500, "store-failed"),
        };
        match error {
            ExecutorError::Machine(error) => error.into(),
            ExecutorError::Peer(error) => error.into(),
            other => Self::of(status, kind, &other),
        }
    }
}
