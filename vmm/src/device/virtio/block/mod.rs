//! The disk of a machine (virtio 1.2, section 5.2): read, write, flush, discard, write-zeroes and get-id.
//!
//! ```text
//! queue ──pop──> Request (parsed, checked) ──> slot ──> io_uring ──> image, from or into guest memory
//!                    │ immediate answers                   │ completion: more to do? ── yes ──> io_uring
//!                    ▼                                     ▼ no
//!                 used ring <───── status byte <───── dirty blocks and dirty pages marked
//! ```
//!
//! * `request.rs`: what a chain asks for, and whether it may.
//! * `transfer.rs`: one accepted request on its way through the ring: short transfers, bounce buffers, lists of ranges.
//! * `answers.rs`: answers that wait while a migration mirrors the guest's writes.
//! * `worker.rs`: the thread: queue, ring, pause.
//! * `device.rs`: the device as the machine sees it, and its configuration space; `state.rs`: its saved state.
//!
//! Data moves between the image and guest memory without a copy. Where the image is read with `O_DIRECT` and the guest's
//! buffers are not aligned for it, a bounce buffer is used, in pieces.

mod answers;
mod counters;
mod device;
mod request;
mod state;
#[cfg(test)]
mod tests;
mod transfer;
mod worker;

pub use counters::BlockCounters;
pub use device::{Block, slot};

/// Parses a chain for the fuzz targets, and checks what every accepted request has to keep.
#[cfg(feature = "fuzzing")]
pub(super) fn examine(
    ram: &crate::memory::GuestRam,
    chain: &super::Chain,
    bytes: u64,
    read_only: bool,
    data: &mut Vec<super::Segment>,
) {
    use request::{Limits, Verdict, Work};
    let (verdict, status) = request::parse(chain, Limits { bytes, read_only }, data);
    let length = super::Chain::bytes(data) as u64;
    match verdict {
        Verdict::Malformed => assert!(status.is_none()),
        Verdict::Answer { .. } => assert!(status.is_some()),
        Verdict::Work(Work::Read { offset }) => {
            assert!(offset + length <= bytes);
            super::Chain::copy_in(ram, data, 0, &vec![0xee; length as usize]);
        }
        Verdict::Work(Work::Write { offset }) => {
            assert!(!read_only && offset + length <= bytes);
            super::Chain::copy_out(data, 0, &mut vec![0; length as usize]);
        }
        Verdict::Work(Work::Flush) => {}
        Verdict::Work(Work::Discard(ranges)) => {
            assert!(!read_only && ranges.iter().all(|range| range.start <= range.end && range.end <= bytes));
        }
        Verdict::Work(Work::WriteZeroes(ranges)) => {
            assert!(!read_only && ranges.iter().all(|(range, _)| range.start <= range.end && range.end <= bytes));
        }
    }
}

/// Number of queues.
pub const QUEUES: usize = 1;

/// Feature bits (virtio 1.2, section 5.2.3).
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Descriptors in the queue.
const QUEUE_SIZE: u16 = 256;
/// Data segments in one request: a queue's length without header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Requests in flight at the image.
const IN_FLIGHT_MAX: usize = 64;
/// Ranges in one discard or write-zeroes request.
const RANGES_MAX: u32 = 16;
/// Sectors in one such range: 2 GiB, so that one request does not hold a pause for long.
const RANGE_SECTORS_MAX: u32 = 1 << 22;
