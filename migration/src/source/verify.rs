//! After the resume: the destination gets digests of what the machine held when it stopped, and compares what the guest has
//! not overwritten.
//!
//! Digests of memory are made only now, from the stopped and fenced machine itself: the channels have less to do while they
//! send, and a page that was written but not sent again is found as well as one that was damaged on its way. Of disks, which
//! may be far larger, they are those of the blocks as they were last read and sent.
//!
//! Nothing that goes wrong here changes the outcome: the machine runs at the destination. What could not be checked stays
//! `null` in the report.

use std::time::{Duration, Instant};

use super::context::{Context, Sent, by_peer};
use super::link::Link;
use super::round::stop_tracking;
use crate::error::{Doing, MigrationError};
use crate::guest::{BLOCK_BYTES, PAGE_BYTES};
use crate::page::{Digests, digest};
use crate::transport::channels::Channel;
use crate::urgency::{Bulk, Turns};
use crate::wire::WireError;
use crate::wire::frame::{MAX_DIGESTS, Subject};
use crate::wire::message::{Comparison, Message};
use crate::wire::version;

/// For the comparison, beside the time that its amount takes.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(60);
/// The slowest comparison that is waited for.
const VERIFY_BYTES_PER_SECOND: u64 = 50 << 20;
/// The machine's first moments at its new place belong to it: it faults in what it works with, and queued packets wait.
const COURTESY: Duration = Duration::from_millis(50);
/// Digests in one frame.
const CHUNK: usize = 16 << 10;
/// Pages of the stopped machine read at once: they stay in the second-level cache until they are hashed.
const READ_PAGES: usize = 64;
/// Pages after which their digests leave, so that the destination compares while this end still reads.
const FLUSH_PAGES: usize = 4 << 10;
const _: () = assert!(CHUNK <= MAX_DIGESTS);

/// The machine runs at the destination.
pub(super) struct Verify {
    link: Link,
    sent: Sent,
}

impl Verify {
    pub(super) fn new(link: Link, sent: Sent) -> Self {
        Self { link, sent }
    }

    pub(super) fn run(mut self, context: &mut Context) {
        // All memory is read once more, while the guest runs.
        let bulk = Bulk::here();
        let wanted = self.link.features.iter().any(|name| name == version::VERIFY);
        if !wanted {
            tracing::warn!("the destination's release cannot verify");
        } else if let Err(error) = self.compare(context) {
            tracing::warn!(error = %error.chain(), "the machine was moved, but could not be verified");
        }
        bulk.hurry();
        // A dirty log is stopped only now: stopping it takes milliseconds, and the guest would have waited for them.
        stop_tracking(context);
        context.report.memory.pages_zero = self.sent.layout.pages() - self.sent.held.count();
        let _ = self.link.control.send(&Message::Goodbye);
        self.link.control.close();
        self.link.workers.end();
    }

    fn compare(&mut self, context: &mut Context) -> Result<(), MigrationError> {
        std::thread::sleep(COURTESY);
        let control = &mut self.link.control;
        let disk_bytes: u64 = self.sent.layout.disks.iter().map(|disk| disk.bytes).sum();
        let bytes = self.sent.layout.pages() * PAGE_BYTES + disk_bytes;
        let allowed = VERIFY_TIMEOUT + Duration::from_secs(bytes / VERIFY_BYTES_PER_SECOND);
        control.set_patience(allowed);
        control.set_deadline(Some(Instant::now() + allowed));
        send_memory(context, control, &self.sent)?;
        let layouts = &self.sent.layout.disks;
        for (number, (digests, layout)) in self.sent.disks.iter().zip(layouts).enumerate() {
            let zero = |block| crate::page::zero_block(layout.block_bytes(block));
            send_table(control, Subject::Disk(number as u16), digests, zero)?;
        }
        control.send(&Message::DigestsEnd)?;
        let (memory, disks) = match control.receive("waiting for the digests to be compared").map_err(by_peer)? {
            Message::Verified { memory, disks } => (memory, disks),
            other => return Err(WireError::Unexpected { found: other.name(), expected: "Verified" }.into()),
        };
        let verification = &mut context.report.verification;
        verification.note(&memory, &disks);
        if let Some(text) = differences(&memory, &disks) {
            tracing::error!("{text}");
            context.report.reason = text;
        }
        Ok(())
    }
}

/// What differs, in words.
pub(crate) fn differences(memory: &Comparison, disks: &Comparison) -> Option<String> {
    let page = memory.first_different.map(|page| {
        format!("{} pages at the destination are not what was sent, the first is page {page}", memory.different)
    });
    let block = disks.first_different.map(|block| {
        let (count, disk) = (disks.different, disks.first_disk);
        format!("{count} blocks at the destination are not what was sent, the first is block {block} of disk {disk}")
    });
    match (page, block) {
        (Some(page), Some(block)) => Some(format!("{page}; {block}")),
        (page, block) => page.or(block),
    }
}

impl crate::report::Verification {
    /// Takes over what was compared.
    pub(crate) fn note(&mut self, memory: &Comparison, disks: &Comparison) {
        self.memory_digest_ok = Some(memory.different == 0);
        self.disk_digest_ok = Some(disks.different == 0);
        (self.pages_checked, self.pages_overwritten) = (memory.equal + memory.different, memory.overwritten);
        (self.blocks_checked, self.blocks_overwritten) = (disks.equal + disks.different, disks.overwritten);
    }
}

/// Reads what the machine held when it stopped, and sends its digests, leaving out what was never touched. What was not sent
/// because the guest does not use it has to be zeroes.
fn send_memory(context: &Context, control: &mut Channel, sent: &Sent) -> Result<(), MigrationError> {
    let (pages, zero) = (sent.layout.pages(), digest(&[0; PAGE_BYTES as usize]));
    let mut buffer = vec![0; READ_PAGES * PAGE_BYTES as usize];
    let (mut values, mut from, mut queued) = (Vec::with_capacity(READ_PAGES), 0, 0);
    let mut turns = Turns::new();
    while let Some(run) = context.guest.next_populated(from).doing("looking for populated memory")? {
        let end = run.end.min(pages);
        if run.start >= end {
            break;
        }
        for first in (run.start..end).step_by(READ_PAGES) {
            let count = (end - first).min(READ_PAGES as u64) as usize;
            let bytes = &mut buffer[..count * PAGE_BYTES as usize];
            context.guest.read_pages(first, bytes).doing("reading guest memory")?;
            values.clear();
            let pages = (first..).zip(bytes.chunks_exact(PAGE_BYTES as usize));
            values.extend(pages.map(|(page, bytes)| if sent.skipped.contains(page) { zero } else { digest(bytes) }));
            control.send_digests(Subject::Memory, first, &values)?;
            queued += count;
            if queued >= FLUSH_PAGES {
                control.flush()?;
                queued = 0;
            }
            turns.pass();
        }
        from = end;
    }
    Ok(control.flush()?)
}

/// Sends a table, leaving out stretches that are all zero.
fn send_table(
    control: &mut Channel,
    subject: Subject,
    digests: &Digests,
    zero: impl Fn(u64) -> u64,
) -> Result<(), MigrationError> {
    let mut values = Vec::with_capacity(CHUNK);
    let mut first = 0;
    while first < digests.len() {
        values.clear();
        values.extend((first..digests.len()).take(CHUNK).filter_map(|index| digests.get(index)));
        let all_zero = values.iter().zip(first..).all(|(&value, index)| value == zero(index));
        if !all_zero {
            control.send_digests(subject, first, &values)?;
        }
        first += values.len() as u64;
    }
    control.flush()?;
    Ok(())
}

/// Test mode: digests of everything that the stopped machine holds.
pub(super) fn send_images(context: &Context, link: &mut Link, sent: &Sent) -> Result<(), MigrationError> {
    const PAGES: u64 = 256;
    let mut buffer = vec![0; (PAGES * PAGE_BYTES) as usize];
    let (mut page, pages) = (0, sent.layout.pages());
    while page < pages {
        let count = PAGES.min(pages - page);
        let bytes = &mut buffer[..(count * PAGE_BYTES) as usize];
        context.guest.read_pages(page, bytes).doing("reading guest memory")?;
        let values: Vec<u64> = bytes.chunks_exact(PAGE_BYTES as usize).map(digest).collect();
        link.control.send_digests(Subject::Memory, page, &values)?;
        page += count;
    }
    for (number, (disk, layout)) in context.guest.disks().iter().zip(&sent.layout.disks).enumerate() {
        let mut reader = disk.reader().doing("opening a disk for reading")?;
        for block in 0..layout.blocks() {
            reader.submit(block).doing("reading a disk")?;
            let length = layout.block_bytes(block).min(BLOCK_BYTES) as usize;
            let mut value = None;
            reader.complete(&mut |_, bytes| value = bytes.get(..length).map(digest)).doing("reading a disk")?;
            let value = value.ok_or(MigrationError::Bug("disk reader"))?;
            link.control.send_digests(Subject::Disk(number as u16), block, &[value])?;
        }
    }
    Ok(link.control.send(&Message::DigestsEnd)?)
}
