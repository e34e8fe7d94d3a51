//! What ends a migration before its time, at either end.

use std::error::Error;
use std::time::Duration;

use crate::guest::GuestError;
use crate::transport::TransportError;
use crate::transport::tls::TlsError;
use crate::wire::WireError;

/// Why a migration did not go on.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The machine at this end, or one of its disks.
    #[error("{doing} failed")]
    Guest {
        /// What was asked of it.
        doing: &'static str,
        /// In its words.
        #[source]
        source: GuestError,
    },
    /// A channel.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The other end gave up.
    #[error("the {peer} gave up: {reason}")]
    Peer {
        /// `source` or `destination`.
        peer: &'static str,
        /// In its words.
        reason: String,
    },
    /// Somebody asked for it.
    #[error("cancelled at the operator's wish")]
    Cancelled,
    /// The rounds would not end.
    #[error("{reason}")]
    NotConverging {
        /// With the measured rates, and what to do.
        reason: String,
    },
    /// The time allowed is over.
    #[error("not ready for the switchover after {} s; allow more time, more bandwidth or a longer downtime", after.as_secs())]
    TimedOut {
        /// The time allowed.
        after: Duration,
    },
    /// The switchover takes much longer than it was expected to.
    #[error(
        "the guest was stopped for several times as long as the switchover was expected to take, so it was let go again: the link or the \
         destination's disk became slow; try again"
    )]
    PausedTooLong,
    /// Nobody came.
    #[error("no source proved itself within {} s; the last attempt: {last}", after.as_secs_f64())]
    NobodyCame {
        /// The time allowed.
        after: Duration,
        /// What went wrong with the last connection.
        last: String,
    },
    /// Data channels that were announced are missing.
    #[error("only {attached} of {expected} data channels were connected within {} s", after.as_secs())]
    ChannelsMissing {
        /// Connected.
        attached: usize,
        /// Announced.
        expected: usize,
        /// The time allowed.
        after: Duration,
    },
    /// What arrived is not what was sent.
    #[error("{difference}; nothing was committed")]
    Different {
        /// The first difference.
        difference: String,
    },
    /// The operator gave a post-copy up whose link was lost.
    #[error(
        "the operator gave the post-copy up; the link was lost ({last}), the destination runs the machine without what it lacked, \
         and stops for good where it needs that: restart the machine from its disks at the source, which are as they were at the switchover, or from a backup"
    )]
    Abandoned {
        /// Why the last attempt to reconnect failed.
        last: String,
    },
    /// The process that was to run the machine is gone, or never got Commit.
    #[error(
        "nobody listens at the destination any more ({last}): its process has ended, or never got Commit; the machine stays fenced here \
         until it is known which"
    )]
    NobodyListens {
        /// Why the last attempt to reconnect failed.
        last: String,
    },
    /// The options make no sense.
    #[error("{0}")]
    Options(String),
    /// A thread of this end died.
    #[error("a thread of the migration ended by itself ({0}): this is a bug")]
    Bug(&'static str),
}

impl MigrationError {
    /// Turns the words of a peer that gave up into an error of their own kind.
    pub(crate) fn by_peer(peer: &'static str, error: TransportError) -> Self {
        match error {
            TransportError::Aborted { reason } => Self::Peer { peer, reason },
            other => other.into(),
        }
    }

    /// Whether the next attempt may succeed without anybody having changed anything: the link, or the process at its other
    /// end, went away. What either end refuses it will refuse again.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Transport(TransportError::Stopped) => false,
            Self::Transport(error) => error.is_link(),
            Self::PausedTooLong => true,
            _ => false,
        }
    }

    /// The error and its causes in one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

impl From<TlsError> for MigrationError {
    fn from(error: TlsError) -> Self {
        TransportError::from(error).into()
    }
}

impl From<WireError> for MigrationError {
    fn from(error: WireError) -> Self {
        TransportError::from(error).into()
    }
}

/// Adds what was asked of the machine to its answer.
pub(crate) trait Doing<T> {
    /// See [`MigrationError::Guest`].
    fn doing(self, doing: &'static str) -> Result<T, MigrationError>;
}

impl<T> Doing<T> for Result<T, GuestError> {
    fn doing(self, doing: &'static str) -> Result<T, MigrationError> {
        self.map_err(|source| MigrationError::Guest { doing, source })
    }
}
