//! Bytes between the two ends: TCP, TLS on top of it, frames on top of that, and the budget of all of them together.

pub mod channels;
mod handshake;
mod keys;
pub mod limiter;
mod line;
pub mod pack;
mod record;
pub mod stop;
pub mod stream;
pub mod tcp;
pub mod tls;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use crate::transport::tls::TlsError;
use crate::wire::WireError;

/// A channel does not work, or its peer does not behave.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Nobody listens, or nobody can be reached.
    #[error("cannot connect to {address} (is the destination waiting there, and does the network let it through?)")]
    Connect {
        /// Where to.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The link broke.
    #[error("link lost while {doing}")]
    Io {
        /// What was going on.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The peer went away.
    #[error("the peer closed the connection while {doing}; its log says why")]
    Closed {
        /// What was going on.
        doing: &'static str,
    },
    /// Nothing came or went for too long.
    #[error("nothing moved for {} ms while {doing}: the peer hangs or the network is cut", after.as_millis())]
    Silent {
        /// What was going on.
        doing: &'static str,
        /// For how long.
        after: Duration,
    },
    /// Bytes came, but not soon enough.
    #[error("not done in time while {doing}: the peer is too slow, or holds this end up on purpose")]
    TooSlow {
        /// What was going on.
        doing: &'static str,
    },
    /// This end decided to stop.
    #[error("stopped")]
    Stopped,
    /// TLS refused.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// What arrived over TLS means nothing.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer gave up and said why.
    #[error("{reason}")]
    Aborted {
        /// In the peer's words.
        reason: String,
    },
}

impl TransportError {
    /// Whether the link failed, rather than what came over it: then the other end may have said why elsewhere.
    pub fn is_link(&self) -> bool {
        matches!(
            self,
            Self::Io { .. } | Self::Closed { .. } | Self::Silent { .. } | Self::TooSlow { .. } | Self::Stopped
        )
    }
}
