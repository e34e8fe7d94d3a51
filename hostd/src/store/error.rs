//! What can go wrong.

use std::path::PathBuf;

/// The store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened.
    #[error("cannot open the store {}: does another hostd use this state_dir, or is the file damaged?", path.display())]
    Open {
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: Box<redb::Error>,
    },
    /// Reading or writing failed.
    #[error("the store failed: is the disk full?")]
    Access(#[source] Box<redb::Error>),
    /// It has failed a moment ago.
    #[error("the store has failed, and is opened again in a moment: is the disk full?")]
    Closed,
    /// A record is not what this version understands.
    #[error("the store holds a {kind} that cannot be read: was it written by a newer hostd?")]
    Record {
        /// Table.
        kind: &'static str,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
    /// The audit log was changed behind hostd's back.
    #[error("audit record {sequence} does not follow from the one before: the log was altered")]
    AuditBroken {
        /// The first record that does not fit.
        sequence: u64,
    },
}

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> Self {
        Self::Access(Box::new(error.into()))
    }
}
