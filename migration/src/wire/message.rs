//! Control messages.
//!
//! They are encoded with postcard: variants by number, so they are only ever appended; a variant's fields never change
//! within a protocol version.

use serde::{Deserialize, Serialize};

use super::WireError;
use super::handshake::{Hello, Welcome};
use crate::guest::{MachineLayout, StatePayload};
use crate::page::StrongDigest;

/// Longest text that is taken over from a peer, in bytes.
pub const MAX_TEXT: usize = 4096;

/// What one channel carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Pages or blocks with data.
    pub data: u64,
    /// Pages or blocks sent as zeroes.
    pub zero: u64,
}

/// What was compared after the resume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparison {
    /// Pages or blocks that were compared and equal.
    pub equal: u64,
    /// Overwritten by the guest before they could be compared.
    pub overwritten: u64,
    /// Neither: what is here is not what was sent.
    pub different: u64,
    /// Disk of the first difference; 0 for memory.
    pub first_disk: u16,
    /// Number of the first page or block that differs.
    pub first_different: Option<u64>,
}

/// Longest bitmap in one [`Message::Missing`], in bytes.
pub const MAX_MISSING_BYTES: usize = 64 << 10;

/// Most blocks in one [`Message::AskReusable`].
pub const MAX_REUSABLE: usize = 1024;

/// What the destination measured in post-copy, over all sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostcopyFigures {
    /// Pages and blocks that the guest waited for.
    pub faults: u64,
    /// Median time from taking such a fault to waking the guest, in nanoseconds.
    pub fault_ns_p50: u64,
    /// 99th percentile.
    pub fault_ns_p99: u64,
    /// Pages that came without being waited for.
    pub pushed_pages: u64,
}

/// A control message. `s` marks those sent by the source, `d` those sent by the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// s: first message of every channel.
    Hello(Hello),
    /// d: the channel is accepted.
    Welcome(Welcome),
    /// s d: this end has given up and says why. From the destination, also after Commit, it means: the machine did not
    /// run here and never will.
    Abort {
        /// Cause and remedy.
        reason: String,
    },
    /// s: what the destination has to build.
    Layout {
        /// The machine.
        layout: MachineLayout,
        /// Number of memory channels.
        streams: u16,
    },
    /// d: built, and all channels are there.
    Ready,
    /// s: are you there?
    Ping {
        /// Returned in the answer.
        nonce: u64,
    },
    /// d: yes.
    Pong {
        /// Of the question.
        nonce: u64,
    },
    /// s, on every data channel: everything of this round was sent on it.
    RoundEnd {
        /// Number of the round.
        round: u32,
        /// The guest is stopped: no further round follows.
        last: bool,
        /// What the channel has carried since the migration began, to be compared with what arrived.
        totals: Totals,
    },
    /// d, on the same channel: everything before the marker is in memory, or on stable storage.
    RoundAck {
        /// Of the marker.
        round: u32,
    },
    /// s, disk channel: blocks that read as zeroes: (first, count).
    ZeroBlocks {
        /// Disk number.
        disk: u16,
        /// First block.
        first: u64,
        /// How many.
        count: u64,
    },
    /// s: digests of the whole stopped machine follow as digest frames, ended by [`Message::DigestsEnd`]; compare them.
    CompareFull,
    /// s: no more digests.
    DigestsEnd,
    /// d: `None` if both images are the same, else the first difference.
    Compared {
        /// In words.
        difference: Option<String>,
    },
    /// s: everything but memory and disks. It is restored once every data channel has had its last marker.
    State {
        /// Of all devices.
        #[serde(deserialize_with = "crate::wire::bounded::items")]
        payloads: Vec<StatePayload>,
    },
    /// d: all is here, checked and restored; the machine can run.
    Prepared {
        /// Time spent in restoring, in microseconds.
        restore_us: u64,
    },
    /// s: the machine is fenced here and belongs to the destination now.
    Commit,
    /// d: it runs.
    Resumed {
        /// From the arrival of Commit until it ran, in microseconds.
        resume_us: u64,
    },
    /// d: what the comparison after the resume found.
    Verified {
        /// Pages.
        memory: Comparison,
        /// Blocks of all disks.
        disks: Comparison,
    },
    /// s: thank you; the source may forget the machine now.
    Goodbye,
    /// s: this migration goes on as post-copy: the list of what has to come again follows, then the channels of a session.
    PostcopyPrepare,
    /// d: the session's channels are attached.
    PostcopyReady,
    /// s, control channel: what the destination lacks. d, fault channel of a later session: what it still lacks.
    Missing {
        /// Disk number; `None` is memory.
        disk: Option<u16>,
        /// Number of the first bit, a multiple of 64.
        first: u64,
        /// One bit for each page or block, the lowest bit first, in words of 64; at most [`MAX_MISSING_BYTES`].
        bits: Vec<u8>,
    },
    /// s d: the list is complete.
    MissingEnd {
        /// Bits set for memory.
        pages: u64,
        /// Bits set for all disks.
        blocks: u64,
    },
    /// d, fault channel: the guest waits for this page or block.
    Demand {
        /// Disk number; `None` is memory.
        disk: Option<u16>,
        /// Page or block number.
        number: u64,
    },
    /// d, fault channel: everything is here, blocks on stable storage. The channel is the control channel from here on.
    Complete(PostcopyFigures),
    /// s, fault channel: heard; nothing will be asked for any more.
    CompleteAck,
    /// s, disk channel, before these blocks: what does the image hold of them? Only with the feature `reuse`.
    AskReusable {
        /// Disk number.
        disk: u16,
        /// First block.
        first: u64,
        /// How many, 1 to [`MAX_REUSABLE`].
        count: u16,
    },
    /// d, disk channel: the answer, one for each block in order: the BLAKE3 digest, or `None` for zeroes.
    Reusable {
        /// What an earlier attempt has left.
        #[serde(deserialize_with = "crate::wire::bounded::items")]
        digests: Vec<Option<StrongDigest>>,
    },
}

impl Message {
    /// Its name, for messages about it.
    pub fn name(&self) -> &'static str {
        match self {
            Message::Hello(_) => "Hello",
            Message::Welcome(_) => "Welcome",
            Message::Abort { .. } => "Abort",
            Message::Layout { .. } => "Layout",
            Message::Ready => "Ready",
            Message::Ping { .. } => "Ping",
            Message::Pong { .. } => "Pong",
            Message::RoundEnd { .. } => "RoundEnd",
            Message::RoundAck { .. } => "RoundAck",
            Message::ZeroBlocks { .. } => "ZeroBlocks",
            Message::CompareFull => "CompareFull",
            Message::DigestsEnd => "DigestsEnd",
            Message::Compared { .. } => "Compared",
            Message::State { .. } => "State",
            Message::Prepared { .. } => "Prepared",
            Message::Commit => "Commit",
            Message::Resumed { .. } => "Resumed",
            Message::Verified { .. } => "Verified",
            Message::Goodbye => "Goodbye",
            Message::PostcopyPrepare => "PostcopyPrepare",
            Message::PostcopyReady => "PostcopyReady",
            Message::Missing { .. } => "Missing",
            Message::MissingEnd { .. } => "MissingEnd",
            Message::Demand { .. } => "Demand",
            Message::Complete(_) => "Complete",
            Message::CompleteAck => "CompleteAck",
            Message::AskReusable { .. } => "AskReusable",
            Message::Reusable { .. } => "Reusable",
        }
    }

    /// As it goes into a message frame.
    ///
    /// # Errors
    ///
    /// [`WireError::Malformed`] if it cannot be encoded.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        postcard::to_stdvec(self).map_err(|error| WireError::Malformed { kind: self.name(), detail: error.to_string() })
    }

    /// Decodes the payload of a message frame, whose length the caller has checked.
    ///
    /// # Errors
    ///
    /// [`WireError::Malformed`] if it is not exactly one message.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let malformed = |detail: String| WireError::Malformed { kind: "message", detail };
        match postcard::take_from_bytes(payload) {
            Ok((message, [])) => Ok(message),
            Ok((_, rest)) => Err(malformed(format!("{} bytes too many", rest.len()))),
            Err(error) => Err(malformed(error.to_string())),
        }
    }
}

/// Text from a peer, made fit for a log and a report: cut to [`MAX_TEXT`], without control characters.
pub fn sanitised(text: &str) -> String {
    let mut clean = String::with_capacity(text.len().min(MAX_TEXT));
    for character in text.chars() {
        if clean.len() + character.len_utf8() > MAX_TEXT {
            break;
        }
        clean.push(if character.is_control() { ' ' } else { character });
    }
    clean
}
