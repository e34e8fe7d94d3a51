//! What travels between the two ends, and how bytes from outside are turned into it.
//!
//! Nothing here does I/O. Every decoder takes a slice whose length was checked against a cap before anything was
//! allocated, and returns an error on whatever it does not know: no input makes it panic.

pub(crate) mod bounded;
pub mod frame;
pub mod handshake;
pub mod layout;
pub mod message;
pub mod missing;
pub mod version;

/// Bytes that do not mean what they should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A frame of a kind that this version does not have.
    #[error("frame of unknown kind {kind}: the peer does not speak this protocol, or a newer one than was agreed")]
    UnknownKind {
        /// The byte found.
        kind: u8,
    },
    /// A header field that has to be zero is not.
    #[error("reserved bits of a frame header are set ({bits:#06x}): the peer does not speak this protocol")]
    Reserved {
        /// The bits found.
        bits: u16,
    },
    /// A frame that says it is longer than its kind may be. Nothing of it was read.
    #[error("{kind} frame of {length} bytes; at most {cap} are accepted")]
    TooLong {
        /// Kind of frame.
        kind: &'static str,
        /// Its announced length.
        length: u64,
        /// The most that is accepted.
        cap: u64,
    },
    /// Frames were lost, repeated or put in another order.
    #[error("frame {found} arrived where frame {expected} was due: the stream was cut, repeated or reordered")]
    Sequence {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        found: u64,
    },
    /// The payload does not have the shape that its kind needs.
    #[error("malformed {kind}: {detail}")]
    Malformed {
        /// What it should have been.
        kind: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// Page or block numbers outside the machine.
    #[error("{what} {first}+{count} lie outside the machine, which has {limit}: the source lies or is broken")]
    OutOfRange {
        /// `pages`, or `blocks of disk n`.
        what: String,
        /// First number.
        first: u64,
        /// How many.
        count: u64,
        /// How many there are.
        limit: u64,
    },
    /// A good message at a moment when it has no meaning.
    #[error("unexpected {found} while waiting for {expected}")]
    Unexpected {
        /// What came.
        found: &'static str,
        /// What was due.
        expected: &'static str,
    },
    /// No version is spoken by both ends.
    #[error(
        "the peer speaks protocol versions {theirs_min} to {theirs_max}, this end {ours_min} to {ours_max}: bring both hosts to releases that are at most one apart"
    )]
    NoCommonVersion {
        /// Oldest that the peer speaks.
        theirs_min: u16,
        /// Newest that the peer speaks.
        theirs_max: u16,
        /// Oldest of this end.
        ours_min: u16,
        /// Newest of this end.
        ours_max: u16,
    },
}

/// Reads a little-endian `u32` at `at`; the caller has checked the length.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Reads a little-endian `u64` at `at`.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
