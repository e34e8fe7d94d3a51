//! What a descriptor chain asks of a disk (virtio 1.2, section 5.2.6).

use std::ops::Range;

use super::{RANGE_SECTORS_MAX, RANGES_MAX};
use crate::device::virtio::{Chain, Segment};
use crate::disk::SECTOR_BYTES;

/// Answer in the status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Could not be done, or may not be.
    Error = 1,
    /// Unknown kind of request.
    Unsupported = 2,
}

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;
const ID_BYTES: usize = 20;

/// Request types.
mod kind {
    pub const READ: u32 = 0;
    pub const WRITE: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// The space of a write-zeroes range may be given back.
const FLAG_UNMAP: u32 = 1;

/// An accepted request, to be carried out.
#[derive(Clone, Debug)]
pub enum Work {
    /// From the image into guest memory.
    Read { offset: u64 },
    /// From guest memory into the image.
    Write { offset: u64 },
    /// All completed writes to stable storage.
    Flush,
    /// The ranges are not needed any more.
    Discard(Vec<Range<u64>>),
    /// The ranges shall read as zeroes; the flag allows to give the space back.
    WriteZeroes(Vec<(Range<u64>, bool)>),
}

/// What becomes of a chain.
#[derive(Debug)]
pub enum Verdict {
    /// No request at all: header or status byte is missing.
    Malformed,
    /// Answered at once.
    Answer { status: Status, identity: bool },
    /// To be carried out on the data segments.
    Work(Work),
}

/// The disk, as far as a request must fit it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Capacity in bytes.
    pub bytes: u64,
    /// Refuse writes.
    pub read_only: bool,
}

/// Parses a chain. `data` receives the segments to be read or written, `status` that of the status byte.
pub fn parse(chain: &Chain, limits: Limits, data: &mut Vec<Segment>) -> (Verdict, Option<Segment>) {
    data.clear();
    let mut header = [0; HEADER_BYTES];
    let Some(status) = chain.writable.iter().rev().find(|segment| segment.bytes > 0) else {
        return (Verdict::Malformed, None);
    };
    if Chain::copy_out(&chain.readable, 0, &mut header) < HEADER_BYTES {
        return (Verdict::Malformed, None);
    }
    let status = status.part(status.bytes - 1, 1);
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64::from_le_bytes(header[8..16].try_into().unwrap_or_default());
    let answer = |status| Verdict::Answer { status, identity: false };
    let verdict = match kind {
        kind::READ | kind::WRITE => {
            if kind == kind::READ {
                slice(&chain.writable, 0, Chain::bytes(&chain.writable) - 1, data);
            } else {
                slice(&chain.readable, HEADER_BYTES, usize::MAX, data);
            }
            let length = Chain::bytes(data) as u64;
            let offset = sector.checked_mul(SECTOR_BYTES);
            let fits = offset.and_then(|offset| offset.checked_add(length)).is_some_and(|end| end <= limits.bytes);
            match offset {
                Some(offset) if fits && length.is_multiple_of(SECTOR_BYTES) => match kind {
                    kind::READ => Verdict::Work(Work::Read { offset }),
                    _ if limits.read_only => answer(Status::Error),
                    _ => Verdict::Work(Work::Write { offset }),
                },
                _ => answer(Status::Error),
            }
        }
        kind::FLUSH => Verdict::Work(Work::Flush),
        kind::GET_ID => Verdict::Answer { status: Status::Ok, identity: true },
        kind::DISCARD | kind::WRITE_ZEROES if limits.read_only => answer(Status::Error),
        kind::DISCARD => match ranges(chain, limits) {
            Ok(ranges) if ranges.iter().any(|(_, flags)| *flags != 0) => answer(Status::Unsupported),
            Ok(ranges) => Verdict::Work(Work::Discard(ranges.into_iter().map(|(range, _)| range).collect())),
            Err(status) => answer(status),
        },
        kind::WRITE_ZEROES => match ranges(chain, limits) {
            Ok(ranges) if ranges.iter().any(|(_, flags)| flags & !FLAG_UNMAP != 0) => answer(Status::Unsupported),
            Ok(ranges) => Verdict::Work(Work::WriteZeroes(
                ranges.into_iter().map(|(range, flags)| (range, flags & FLAG_UNMAP != 0)).collect(),
            )),
            Err(status) => answer(status),
        },
        _ => answer(Status::Unsupported),
    };
    (verdict, Some(status))
}

/// The identity of a disk as GET_ID shows it: its name, cut or padded with zeroes to 20 bytes.
pub fn identity(id: &str) -> [u8; ID_BYTES] {
    let mut identity = [0; ID_BYTES];
    let length = id.len().min(ID_BYTES);
    identity[..length].copy_from_slice(&id.as_bytes()[..length]);
    identity
}

/// The part of `segments` between `skip` and `skip + length` bytes.
pub fn slice(segments: &[Segment], mut skip: usize, mut length: usize, into: &mut Vec<Segment>) {
    for segment in segments {
        let part = segment.part(skip, length);
        skip -= skip.min(segment.bytes);
        length -= part.bytes;
        if part.bytes > 0 {
            into.push(part);
        }
    }
}

/// The byte ranges of a discard or write-zeroes request, with their flags.
fn ranges(chain: &Chain, limits: Limits) -> Result<Vec<(Range<u64>, u32)>, Status> {
    let bytes = Chain::bytes(&chain.readable) - HEADER_BYTES;
    if bytes == 0 || !bytes.is_multiple_of(RANGE_BYTES) || bytes > RANGES_MAX as usize * RANGE_BYTES {
        return Err(Status::Error);
    }
    let mut raw = vec![0; bytes];
    Chain::copy_out(&chain.readable, HEADER_BYTES, &mut raw);
    let parse = |entry: &[u8]| {
        let sector = u64::from_le_bytes(entry[..8].try_into().unwrap_or_default());
        let sectors = u32::from_le_bytes(entry[8..12].try_into().unwrap_or_default());
        let flags = u32::from_le_bytes(entry[12..].try_into().unwrap_or_default());
        let start = sector.checked_mul(SECTOR_BYTES).ok_or(Status::Error)?;
        let end = start.checked_add(u64::from(sectors) * SECTOR_BYTES).ok_or(Status::Error)?;
        if end > limits.bytes || sectors > RANGE_SECTORS_MAX {
            return Err(Status::Error);
        }
        Ok((start..end, flags))
    };
    raw.chunks_exact(RANGE_BYTES).map(parse).collect()
}
