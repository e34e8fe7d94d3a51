//! Frames: a fixed header, then a payload whose greatest length is known from its kind.
//!
//! ```text
//!  0      1      2          4            8                    16
//!  +------+------+----------+------------+---------------------+------------------ - - -
//!  | kind | zero | zero     | length     | sequence            | payload (length bytes)
//!  +------+------+----------+------------+---------------------+------------------ - - -
//! ```
//!
//! All numbers are little-endian. `sequence` counts the frames of one direction of one channel from 0: a frame that is
//! missing, repeated or out of place is noticed at once, also if it is our own bug. There is no checksum: every byte lies
//! inside an AEAD-protected TLS record (RFC 8446, section 5.2), which refuses any change on the way, and what happens to
//! pages and blocks before and after TLS is covered by the digests that are compared after the move.
//!
//! | kind | payload | cap |
//! | --- | --- | --- |
//! | 1 message | one [`Message`](super::message::Message) in postcard | 64 MiB (only a state payload is large) |
//! | 2 pages | table of page runs, then the pages, or differences, of the runs that are not zero | 4 MiB + table |
//! | 3 block | disk, block number, bytes of one block | 64 KiB + 16 |
//! | 4 digests | what, first number, digests | 512 KiB + 16 |
//! | 5 packed | head, then an LZ4 block that is the payload of a page or block frame | as for pages |
//!
//! Kind 5 is sent only if both ends named the feature `lz4`, runs of differences only if both named `delta`.

use super::{WireError, u32_at, u64_at};
use crate::guest::{BLOCK_BYTES, PAGE_BYTES};

/// Bytes of a frame header.
pub const HEADER_BYTES: usize = 16;

/// Most runs in one page table.
pub const MAX_RUNS: usize = 4096;

/// Most page data in one frame.
pub const MAX_PAGE_DATA: u64 = 4 << 20;

/// Most digests in one frame.
pub const MAX_DIGESTS: usize = 65_536;

/// Bytes before the data of a block frame.
pub const BLOCK_HEADER_BYTES: usize = 16;

/// Bytes before the digests of a digest frame.
pub const DIGEST_HEADER_BYTES: usize = 16;

const TABLE_HEADER_BYTES: usize = 8;
const RUN_BYTES: usize = 16;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A control message.
    Message = 1,
    /// Runs of pages.
    Pages = 2,
    /// One block of a disk.
    Block = 3,
    /// Digests, for verification.
    Digests = 4,
    /// The payload of a page or block frame, compressed.
    Packed = 5,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 5] = [Kind::Message, Kind::Pages, Kind::Block, Kind::Digests, Kind::Packed];

    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Message => "message",
            Kind::Pages => "page",
            Kind::Block => "block",
            Kind::Digests => "digest",
            Kind::Packed => "packed",
        }
    }

    /// Longest payload that is accepted, in bytes.
    pub fn cap(self) -> u64 {
        match self {
            Kind::Message => 64 << 20,
            Kind::Pages | Kind::Packed => MAX_PAGE_DATA + (TABLE_HEADER_BYTES + MAX_RUNS * RUN_BYTES) as u64,
            Kind::Block => BLOCK_BYTES + BLOCK_HEADER_BYTES as u64,
            Kind::Digests => (MAX_DIGESTS * 8 + DIGEST_HEADER_BYTES) as u64,
        }
    }
}

/// A frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Bytes that follow.
    pub length: u32,
    /// Number of this frame in its direction of its channel.
    pub sequence: u64,
}

impl Header {
    /// The header as it goes on the wire.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[4..8].copy_from_slice(&self.length.to_le_bytes());
        bytes[8..].copy_from_slice(&self.sequence.to_le_bytes());
        bytes
    }

    /// Decodes a header and checks its length against the cap of its kind, before anyone allocates for it.
    ///
    /// # Errors
    ///
    /// [`WireError::UnknownKind`], [`WireError::Reserved`], [`WireError::TooLong`].
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let kind = Kind::ALL
            .into_iter()
            .find(|&kind| kind as u8 == bytes[0])
            .ok_or(WireError::UnknownKind { kind: bytes[0] })?;
        let reserved = u16::from_le_bytes([bytes[2], bytes[3]]) | u16::from(bytes[1]);
        if reserved != 0 {
            return Err(WireError::Reserved { bits: reserved });
        }
        let length = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        if u64::from(length) > kind.cap() {
            return Err(WireError::TooLong { kind: kind.name(), length: length.into(), cap: kind.cap() });
        }
        let sequence = u64_at(bytes, 8).unwrap_or_default();
        Ok(Self { kind, length, sequence })
    }
}

/// What a run of pages carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RunKind {
    /// The pages.
    Data = 0,
    /// Nothing: the pages are zero.
    Zero = 1,
    /// The exclusive or of the pages and of what the receiver holds in their place.
    Delta = 2,
}

impl RunKind {
    /// Every kind.
    pub const ALL: [RunKind; 3] = [RunKind::Data, RunKind::Zero, RunKind::Delta];
}

/// Consecutive pages in a page frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// First page number.
    pub first: u64,
    /// How many.
    pub count: u32,
    /// What they carry.
    pub kind: RunKind,
}

impl PageRun {
    fn data_bytes(&self) -> u64 {
        if self.kind == RunKind::Zero { 0 } else { u64::from(self.count) * PAGE_BYTES }
    }
}

/// Bytes of page data that follow a table.
pub fn data_bytes(runs: &[PageRun]) -> u64 {
    runs.iter().map(PageRun::data_bytes).sum()
}

/// Appends the table of a page frame to `into`.
///
/// ```text
/// runs: u32 | zero: u32 | { first: u64 | count: u32 | 0 data, 1 zeroes, 2 differences: u32 } * runs
/// ```
pub fn encode_table(runs: &[PageRun], into: &mut Vec<u8>) {
    into.extend_from_slice(&(runs.len() as u32).to_le_bytes());
    into.extend_from_slice(&[0; 4]);
    for run in runs {
        into.extend_from_slice(&run.first.to_le_bytes());
        into.extend_from_slice(&run.count.to_le_bytes());
        into.extend_from_slice(&(run.kind as u32).to_le_bytes());
    }
}

/// Bytes of an encoded table of `runs` runs.
pub fn table_bytes(runs: usize) -> usize {
    TABLE_HEADER_BYTES + runs * RUN_BYTES
}

/// Reads the head of a page frame of `length` bytes: how many runs its table has.
///
/// # Errors
///
/// [`WireError::Malformed`] if there are too many, or more than the frame can hold.
pub fn decode_table_head(head: &[u8; TABLE_HEADER_BYTES], length: u32) -> Result<usize, WireError> {
    let malformed = |detail: String| WireError::Malformed { kind: "page frame", detail };
    let runs = u32_at(head, 0).unwrap_or_default() as usize;
    if runs == 0 || runs > MAX_RUNS || head[4..] != [0; 4] {
        return Err(malformed(format!("a table of {runs} runs; 1 to {MAX_RUNS} are accepted")));
    }
    if table_bytes(runs) > length as usize {
        return Err(malformed(format!("{runs} runs do not fit into {length} bytes")));
    }
    Ok(runs)
}

/// Decodes the runs of a page frame of `length` bytes in a machine of `pages` pages.
///
/// # Errors
///
/// [`WireError::Malformed`], [`WireError::OutOfRange`].
pub fn decode_runs(table: &[u8], length: u32, pages: u64, into: &mut Vec<PageRun>) -> Result<(), WireError> {
    let malformed = |detail: String| WireError::Malformed { kind: "page frame", detail };
    into.clear();
    for run in table.chunks_exact(RUN_BYTES) {
        let first = u64_at(run, 0).unwrap_or_default();
        let count = u32_at(run, 8).unwrap_or_default();
        let kind = u32_at(run, 12).unwrap_or(u32::MAX);
        let kind = RunKind::ALL
            .into_iter()
            .find(|&known| known as u32 == kind)
            .ok_or_else(|| malformed(format!("run of unknown kind {kind}")))?;
        if count == 0 || first.checked_add(count.into()).is_none_or(|end| end > pages) {
            return Err(WireError::OutOfRange { what: "pages".to_owned(), first, count: count.into(), limit: pages });
        }
        into.push(PageRun { first, count, kind });
    }
    let expected = table_bytes(into.len()) as u64 + data_bytes(into);
    if expected != u64::from(length) {
        return Err(malformed(format!("its table describes {expected} bytes, its header {length}")));
    }
    Ok(())
}

/// Bytes of the head of a page table.
pub const fn table_head_bytes() -> usize {
    TABLE_HEADER_BYTES
}

/// Bytes before the LZ4 block of a packed frame.
pub const PACKED_HEADER_BYTES: usize = 8;

/// The head of a packed frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedHeader {
    /// What it becomes, [`Kind::Pages`] or [`Kind::Block`].
    pub kind: Kind,
    /// Bytes of the payload that it becomes.
    pub length: u32,
}

impl PackedHeader {
    /// As it goes on the wire: `kind: u8 | zero: 3 bytes | length: u32`.
    pub fn encode(&self) -> [u8; PACKED_HEADER_BYTES] {
        let mut bytes = [0; PACKED_HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[4..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// Decodes it from the start of a packed frame's payload, and checks the length against the cap of what it becomes, before
    /// anyone allocates for it.
    ///
    /// # Errors
    ///
    /// [`WireError::Malformed`], [`WireError::TooLong`].
    pub fn decode(payload: &[u8]) -> Result<(Self, &[u8]), WireError> {
        let malformed = |detail: String| WireError::Malformed { kind: "packed frame", detail };
        let (head, data) = payload
            .split_at_checked(PACKED_HEADER_BYTES)
            .ok_or_else(|| malformed("shorter than its head".to_owned()))?;
        let kind = match head[..4] {
            [2, 0, 0, 0] => Kind::Pages,
            [3, 0, 0, 0] => Kind::Block,
            [kind, ..] => return Err(malformed(format!("of kind {kind}; pages and blocks are accepted"))),
            [] => return Err(malformed("without a kind".to_owned())),
        };
        let length = u32_at(head, 4).unwrap_or_default();
        if u64::from(length) > kind.cap() {
            return Err(WireError::TooLong { kind: kind.name(), length: length.into(), cap: kind.cap() });
        }
        Ok((Self { kind, length }, data))
    }
}

/// The head of a block frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHeader {
    /// Disk number in the layout.
    pub disk: u16,
    /// Block number.
    pub block: u64,
}

impl BlockHeader {
    /// As it goes on the wire: `disk: u16 | zero: 6 bytes | block: u64`.
    pub fn encode(&self) -> [u8; BLOCK_HEADER_BYTES] {
        let mut bytes = [0; BLOCK_HEADER_BYTES];
        bytes[..2].copy_from_slice(&self.disk.to_le_bytes());
        bytes[8..].copy_from_slice(&self.block.to_le_bytes());
        bytes
    }

    /// Decodes it from the start of a block frame's payload.
    ///
    /// # Errors
    ///
    /// [`WireError::Malformed`] if it is too short or its reserved bytes are set.
    pub fn decode(payload: &[u8]) -> Result<(Self, &[u8]), WireError> {
        let malformed = |detail: &str| WireError::Malformed { kind: "block frame", detail: detail.to_owned() };
        let (head, data) =
            payload.split_at_checked(BLOCK_HEADER_BYTES).ok_or_else(|| malformed("shorter than its head"))?;
        if head[2..8] != [0; 6] {
            return Err(malformed("reserved bytes are set"));
        }
        let disk = u16::from_le_bytes([head[0], head[1]]);
        Ok((Self { disk, block: u64_at(head, 8).unwrap_or_default() }, data))
    }
}

/// What a digest belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Pages of memory.
    Memory,
    /// Blocks of one disk.
    Disk(u16),
}

/// A digest frame: consecutive pages or blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests {
    /// Of what.
    pub subject: Subject,
    /// First page or block number.
    pub first: u64,
    /// One for each.
    pub values: Vec<u64>,
}

impl Digests {
    /// As it goes on the wire: `0 memory, 1 disk: u16 | disk: u16 | zero: u32 | first: u64 | digest: u64 ...`.
    pub fn encode(subject: Subject, first: u64, values: impl Iterator<Item = u64>, into: &mut Vec<u8>) {
        let (what, disk) = match subject {
            Subject::Memory => (0u16, 0u16),
            Subject::Disk(disk) => (1, disk),
        };
        into.extend_from_slice(&what.to_le_bytes());
        into.extend_from_slice(&disk.to_le_bytes());
        into.extend_from_slice(&[0; 4]);
        into.extend_from_slice(&first.to_le_bytes());
        for value in values {
            into.extend_from_slice(&value.to_le_bytes());
        }
    }

    /// Decodes a digest frame's payload.
    ///
    /// # Errors
    ///
    /// [`WireError::Malformed`].
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let malformed = |detail: &str| WireError::Malformed { kind: "digest frame", detail: detail.to_owned() };
        let (head, data) =
            payload.split_at_checked(DIGEST_HEADER_BYTES).ok_or_else(|| malformed("shorter than its head"))?;
        let disk = u16::from_le_bytes([head[2], head[3]]);
        let subject = match (u16::from_le_bytes([head[0], head[1]]), disk, &head[4..8]) {
            (0, 0, [0, 0, 0, 0]) => Subject::Memory,
            (1, _, [0, 0, 0, 0]) => Subject::Disk(disk),
            _ => return Err(malformed("unknown subject")),
        };
        if data.is_empty() || data.len() % 8 != 0 || data.len() / 8 > MAX_DIGESTS {
            return Err(malformed("not a whole number of digests"));
        }
        let values = data.chunks_exact(8).map(|digest| u64_at(digest, 0).unwrap_or_default()).collect();
        Ok(Self { subject, first: u64_at(head, 8).unwrap_or_default(), values })
    }
}
