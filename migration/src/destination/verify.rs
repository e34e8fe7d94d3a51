//! After the resume: does this end hold what was sent?
//!
//! The guest runs and writes meanwhile. Pages are read first; what differs is judged only after the dirty pages have been
//! collected: a page that differs and was not written by the guest since the resume is wrong, a page that differs and was
//! written says nothing. So a page can be written while it is read and nothing is judged falsely.

use std::time::{Duration, Instant};

use super::context::{Context, by_peer};
use super::link::Link;
use super::outcome::Received;
use crate::blocks;
use crate::error::{Doing, MigrationError};
use crate::guest::{BLOCK_BYTES, DestinationDisk, DiskLayout, MachineLayout, PAGE_BYTES};
use crate::page::{Bitmap, digest, zero_block, zero_page};
use crate::report::Verification;
use crate::source::differences;
use crate::transport::channels::Incoming;
use crate::urgency::{Bulk, Turns};
use crate::wire::WireError;
use crate::wire::frame::{Digests, Subject};
use crate::wire::message::{Comparison, Message};

/// Pages read at once.
const CHUNK_PAGES: u64 = 64;
/// The source has only to say goodbye.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);

/// The machine runs here.
pub(super) struct Verify {
    link: Link,
    layout: MachineLayout,
    resume: Duration,
    warning: Option<String>,
}

impl Verify {
    pub(super) fn new(link: Link, layout: MachineLayout, resume: Duration, warning: Option<String>) -> Self {
        Self { link, layout, resume, warning }
    }

    pub(super) fn run(mut self, context: &mut Context) -> Received {
        // All memory is read once more, while the guest runs.
        let bulk = Bulk::here();
        let mut verification = Verification::default();
        if self.warning.is_none() {
            match self.compare(context) {
                Ok((memory, disks)) => {
                    verification.note(&memory, &disks);
                    self.warning = differences(&memory, &disks);
                }
                Err(error) => {
                    self.warning = Some(format!("the machine runs here, but was not verified: {}", error.chain()));
                }
            }
        }
        if let Some(warning) = &self.warning {
            tracing::warn!("{warning}");
        }
        bulk.hurry();
        stop_tracking(context);
        self.link.control.set_patience(GOODBYE_TIMEOUT);
        let _ = self.link.control.receive("waiting for the source's goodbye");
        self.link.control.close();
        self.link.end();
        Received { layout: self.layout, resume: self.resume, verification, warning: self.warning }
    }

    fn compare(&mut self, context: &Context) -> Result<(Comparison, Comparison), MigrationError> {
        let start = Instant::now();
        let (pages, blocks) = self.link.arrived();
        let mut memory = MemoryCheck::new(context, pages);
        let mut expected: Vec<Vec<u64>> = self.layout.disks.iter().map(all_zero).collect();
        loop {
            match self.link.control.next("waiting for digests").map_err(by_peer)? {
                Incoming::Digests(digests) => {
                    check_range(&digests, &self.layout)?;
                    match digests.subject {
                        Subject::Memory => memory.compare(digests.first, &digests.values)?,
                        Subject::Disk(number) => expect(&mut expected, number, &digests),
                    }
                }
                Incoming::Message(Message::DigestsEnd) => break,
                other => return Err(WireError::Unexpected { found: other.name(), expected: "digests" }.into()),
            }
        }
        let memory = memory.finish()?;
        let mut disks = Comparison::default();
        for (number, (disk, layout)) in context.guest.disks().iter().zip(&self.layout.disks).enumerate() {
            let (Some(expected), Some(arrived)) = (expected.get(number), blocks.get(number)) else { continue };
            let one = compare_disk(&**disk, layout, expected, arrived)?;
            add(&mut disks, &one, number as u16);
        }
        tracing::info!(?memory, ?disks, ms = start.elapsed().as_millis() as u64, "verified");
        self.link.control.send(&Message::Verified { memory, disks })?;
        Ok((memory, disks))
    }
}

fn all_zero(disk: &DiskLayout) -> Vec<u64> {
    let mut digests = vec![zero_block(BLOCK_BYTES); disk.blocks() as usize];
    if let Some(last) = digests.last_mut() {
        *last = zero_block(disk.block_bytes(disk.blocks() - 1));
    }
    digests
}

/// Notes what the blocks of a disk should hold; the range has been checked.
fn expect(expected: &mut [Vec<u64>], disk: u16, digests: &Digests) {
    let first = digests.first as usize;
    let slots =
        expected.get_mut(usize::from(disk)).and_then(|table| table.get_mut(first..first + digests.values.len()));
    if let Some(slots) = slots {
        slots.copy_from_slice(&digests.values);
    }
}

/// Adds the outcome of one disk to that of all.
fn add(all: &mut Comparison, one: &Comparison, disk: u16) {
    all.equal += one.equal;
    all.overwritten += one.overwritten;
    all.different += one.different;
    if all.first_different.is_none() && one.first_different.is_some() {
        (all.first_disk, all.first_different) = (disk, one.first_different);
    }
}

/// What differs and was not overwritten is wrong.
fn judge(checked: u64, suspects: &Bitmap, dirty: &Bitmap) -> Comparison {
    let mut wrong = suspects.clone();
    wrong.subtract(dirty);
    let (found, different) = (suspects.count(), wrong.count());
    Comparison {
        equal: checked.saturating_sub(found),
        overwritten: found - different,
        different,
        first_disk: 0,
        first_different: wrong.next_run(0, 1).map(|run| run.start),
    }
}

/// Compares memory while digests arrive.
struct MemoryCheck<'a> {
    context: &'a Context,
    /// Pages that came with data and have not been looked at. A page that neither came nor should hold anything is never
    /// read: that would only allocate it here.
    arrived: Bitmap,
    suspects: Bitmap,
    checked: u64,
    buffer: Vec<u8>,
    turns: Turns,
}

impl<'a> MemoryCheck<'a> {
    fn new(context: &'a Context, arrived: Bitmap) -> Self {
        let buffer = vec![0; (CHUNK_PAGES * PAGE_BYTES) as usize];
        Self { context, suspects: Bitmap::new(arrived.len()), arrived, checked: 0, buffer, turns: Turns::new() }
    }

    /// Pages `first..` should have these digests.
    fn compare(&mut self, first: u64, values: &[u64]) -> Result<(), MigrationError> {
        for (chunk, first) in values.chunks(CHUNK_PAGES as usize).zip((first..).step_by(CHUNK_PAGES as usize)) {
            let mut from = 0;
            while from < chunk.len() {
                let wanted = |index: usize| chunk[index] != zero_page() || self.arrived.contains(first + index as u64);
                let length = (from..chunk.len()).take_while(|&index| wanted(index)).count();
                if length > 0 {
                    self.look(first + from as u64, &chunk[from..from + length])?;
                }
                from += length.max(1);
            }
        }
        Ok(())
    }

    /// Reads at most [`CHUNK_PAGES`] and notes those that hold something else.
    fn look(&mut self, first: u64, values: &[u64]) -> Result<(), MigrationError> {
        let bytes = &mut self.buffer[..values.len() * PAGE_BYTES as usize];
        self.context.guest.read_pages(first, bytes).doing("reading guest memory")?;
        for ((page, bytes), &value) in (first..).zip(bytes.chunks_exact(PAGE_BYTES as usize)).zip(values) {
            self.arrived.remove(page);
            if digest(bytes) != value {
                self.suspects.insert(page);
            }
        }
        self.checked += values.len() as u64;
        self.turns.pass();
        Ok(())
    }

    /// What came and was not named should be zeroes.
    fn finish(mut self) -> Result<Comparison, MigrationError> {
        let zeroes = [zero_page(); CHUNK_PAGES as usize];
        let mut from = 0;
        while let Some(run) = self.arrived.next_run(from, CHUNK_PAGES) {
            from = run.end;
            self.look(run.start, &zeroes[..(run.end - run.start) as usize])?;
        }
        let mut dirty = Bitmap::new(self.suspects.len());
        self.context.guest.collect_dirty(&mut dirty).doing("collecting dirty pages")?;
        Ok(judge(self.checked, &self.suspects, &dirty))
    }
}

fn compare_disk(
    disk: &dyn DestinationDisk,
    layout: &DiskLayout,
    expected: &[u64],
    arrived: &Bitmap,
) -> Result<Comparison, MigrationError> {
    let mut wanted = arrived.clone();
    for (block, &value) in (0u64..).zip(expected) {
        if value != zero_block(BLOCK_BYTES) && value != zero_block(layout.block_bytes(block)) {
            wanted.insert(block);
        }
    }
    let mut reader = disk.reader().doing("opening a disk for reading")?;
    let (mut checked, mut suspects) = (0, Bitmap::new(layout.blocks()));
    blocks::read(&mut *reader, layout, wanted.numbers(0..layout.blocks()), |block, bytes| {
        if expected.get(block as usize) != Some(&digest(bytes)) {
            suspects.insert(block);
        }
        checked += 1;
        Ok(())
    })?;
    let mut dirty = Bitmap::new(layout.blocks());
    disk.collect_dirty(&mut dirty).doing("collecting dirty blocks")?;
    Ok(judge(checked, &suspects, &dirty))
}

fn stop_tracking(context: &Context) {
    if let Err(error) = context.guest.stop_dirty_tracking() {
        tracing::warn!(%error, "dirty pages are still tracked");
    }
    for disk in context.guest.disks() {
        if let Err(error) = disk.stop_dirty_tracking() {
            tracing::warn!(%error, "dirty blocks are still tracked");
        }
    }
}

/// Test mode: compares digests of the whole stopped machine, as they arrive. Returns the first difference, in words.
pub(super) fn compare_images(
    context: &Context,
    link: &mut Link,
    layout: &MachineLayout,
) -> Result<Option<String>, MigrationError> {
    let mut difference = None;
    let mut pages = vec![0; (CHUNK_PAGES * PAGE_BYTES) as usize];
    let disks = context.guest.disks();
    loop {
        let digests = match link.control.next("waiting for digests").map_err(by_peer)? {
            Incoming::Digests(digests) => digests,
            Incoming::Message(Message::DigestsEnd) => return Ok(difference),
            other => return Err(WireError::Unexpected { found: other.name(), expected: "digests" }.into()),
        };
        check_range(&digests, layout)?;
        if difference.is_some() {
            continue;
        }
        for (index, chunk) in digests.values.chunks(CHUNK_PAGES as usize).enumerate() {
            let first = digests.first + index as u64 * CHUNK_PAGES;
            let wrong = match digests.subject {
                Subject::Memory => {
                    let bytes = &mut pages[..chunk.len() * PAGE_BYTES as usize];
                    context.guest.read_pages(first, bytes).doing("reading guest memory")?;
                    let held = bytes.chunks_exact(PAGE_BYTES as usize).map(digest);
                    held.zip(chunk).position(|(held, sent)| held != *sent)
                }
                Subject::Disk(number) => {
                    let (Some(disk), Some(layout)) =
                        (disks.get(usize::from(number)), layout.disks.get(usize::from(number)))
                    else {
                        continue;
                    };
                    first_wrong_block(&**disk, layout, first, chunk)?
                }
            };
            if let Some(wrong) = wrong {
                let number = first + wrong as u64;
                difference = Some(match digests.subject {
                    Subject::Memory => format!("page {number} of the stopped machines differs"),
                    Subject::Disk(disk) => format!("block {number} of disk {disk} of the stopped machines differs"),
                });
                break;
            }
        }
    }
}

fn check_range(digests: &Digests, layout: &MachineLayout) -> Result<(), WireError> {
    let (what, limit) = match digests.subject {
        Subject::Memory => ("pages".to_owned(), layout.pages()),
        Subject::Disk(number) => {
            let blocks = layout.disks.get(usize::from(number)).map_or(0, DiskLayout::blocks);
            (format!("blocks of disk {number}"), blocks)
        }
    };
    let (first, count) = (digests.first, digests.values.len() as u64);
    match first.checked_add(count) {
        Some(end) if end <= limit => Ok(()),
        _ => Err(WireError::OutOfRange { what, first, count, limit }),
    }
}

fn first_wrong_block(
    disk: &dyn DestinationDisk,
    layout: &DiskLayout,
    first: u64,
    sent: &[u64],
) -> Result<Option<usize>, MigrationError> {
    let mut reader = disk.reader().doing("opening a disk for reading")?;
    for (index, (block, sent)) in (first..).zip(sent).enumerate() {
        reader.submit(block).doing("reading a disk")?;
        let mut held = None;
        let length = layout.block_bytes(block) as usize;
        reader.complete(&mut |_, bytes| held = bytes.get(..length).map(digest)).doing("reading a disk")?;
        if held != Some(*sent) {
            return Ok(Some(index));
        }
    }
    Ok(None)
}
