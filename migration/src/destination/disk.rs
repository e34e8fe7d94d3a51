//! The disk channel at the destination.

use super::arrivals::{Arrivals, check_totals};
use super::context::by_peer;
use super::reuse;
use crate::error::{Doing, MigrationError};
use crate::guest::{BlockReader, BlockWriter, DestinationGuest, DiskLayout, MachineLayout};
use crate::page::Bitmap;
use crate::transport::channels::{Channel, Incoming};
use crate::urgency::Turns;
use crate::wire::WireError;
use crate::wire::message::{MAX_REUSABLE, Message, Totals};

struct OneDisk<'a> {
    layout: &'a DiskLayout,
    writer: Box<dyn BlockWriter>,
    /// There if the image may hold something already.
    reader: Option<Box<dyn BlockReader>>,
    /// Written since the last flush.
    dirty: bool,
    /// Worth comparing after the resume: came with data, or as a single block of zeroes, which the source has read. Holes
    /// are not: reading all of a large empty disk proves little and takes long.
    arrived: Bitmap,
}

impl OneDisk<'_> {
    fn check(&self, number: u16, first: u64, count: u64) -> Result<(), WireError> {
        let limit = self.layout.blocks();
        if count == 0 || first.checked_add(count).is_none_or(|end| end > limit) {
            return Err(WireError::OutOfRange { what: format!("blocks of disk {number}"), first, count, limit });
        }
        Ok(())
    }

    fn store(&mut self, number: u16, block: u64, data: &[u8]) -> Result<(), MigrationError> {
        self.check(number, block, 1)?;
        let expected = self.layout.block_bytes(block);
        if data.len() as u64 != expected {
            let detail = format!("{} bytes for block {block} of disk {number}, which has {expected}", data.len());
            return Err(WireError::Malformed { kind: "block frame", detail }.into());
        }
        self.writer.write(block, data).doing("writing a disk")?;
        self.arrived.insert(block);
        self.dirty = true;
        Ok(())
    }

    /// What the image holds of these blocks. It counts as arrived: what is wrong comes again.
    fn reusable(&mut self, number: u16, first: u64, count: u64) -> Result<Message, MigrationError> {
        self.check(number, first, count)?;
        let limit = MAX_REUSABLE as u64;
        if count > limit {
            return Err(WireError::OutOfRange { what: "blocks to look at".to_owned(), first, count, limit }.into());
        }
        let unexpected = WireError::Unexpected { found: "AskReusable", expected: "blocks" };
        let reader = self.reader.as_mut().ok_or(unexpected)?;
        let digests = reuse::digests(&mut **reader, self.layout, first..first + count);
        for (block, _) in (first..).zip(&digests).filter(|(_, held)| held.is_some()) {
            self.arrived.insert(block);
            // Nobody knows whether it ever reached stable storage.
            self.dirty = true;
        }
        Ok(Message::Reusable { digests })
    }

    fn zero(&mut self, number: u16, first: u64, count: u64) -> Result<(), MigrationError> {
        self.check(number, first, count)?;
        self.writer.zero(first..first + count).doing("punching a hole into a disk")?;
        if count == 1 {
            self.arrived.insert(first);
        }
        self.dirty = true;
        Ok(())
    }
}

fn disk<'a, 'b>(disks: &'a mut [OneDisk<'b>], number: u16) -> Result<&'a mut OneDisk<'b>, WireError> {
    let limit = disks.len() as u64;
    let outside = WireError::OutOfRange { what: "disks".to_owned(), first: number.into(), count: 1, limit };
    disks.get_mut(usize::from(number)).ok_or(outside)
}

/// Stores what comes until the last marker. A marker is acknowledged once everything before it is on stable storage: the
/// long flushes happen while the guest still runs at the source, and the last one has only the last blocks to do.
pub(super) fn receive_blocks(
    channel: &mut Channel,
    guest: &dyn DestinationGuest,
    layout: &MachineLayout,
    arrivals: &Arrivals,
    reuse: bool,
) -> Result<(), MigrationError> {
    let built = guest.disks();
    if built.len() != layout.disks.len() {
        let text = format!("the machine was built with {} disks instead of {}", built.len(), layout.disks.len());
        return Err(MigrationError::Options(text));
    }
    let mut disks = Vec::new();
    for (disk, layout) in built.iter().zip(&layout.disks) {
        let writer = disk.writer().doing("opening a disk for writing")?;
        let reader = if reuse { Some(disk.reader().doing("opening a disk for reading")?) } else { None };
        disks.push(OneDisk { layout, writer, reader, dirty: false, arrived: Bitmap::new(layout.blocks()) });
    }
    let (mut totals, mut turns) = (Totals::default(), Turns::new());
    loop {
        match channel.next("waiting for blocks").map_err(by_peer)? {
            Incoming::Block { length } => {
                let (head, data) = channel.read_block(length)?;
                disk(&mut disks, head.disk)?.store(head.disk, head.block, data)?;
                totals.data += 1;
                arrivals.control.progress(u64::from(length), 0);
                arrivals.pass(&mut turns);
            }
            Incoming::Message(Message::ZeroBlocks { disk: number, first, count }) => {
                disk(&mut disks, number)?.zero(number, first, count)?;
                totals.zero += count;
            }
            Incoming::Message(Message::AskReusable { disk: number, first, count }) => {
                let answer = disk(&mut disks, number)?.reusable(number, first, count.into())?;
                channel.send(&answer)?;
            }
            Incoming::Message(Message::RoundEnd { round, last, totals: sent }) => {
                check_totals("blocks", sent, totals)?;
                for disk in disks.iter_mut().filter(|disk| disk.dirty) {
                    disk.writer.flush(true).doing("flushing a disk")?;
                    disk.dirty = false;
                }
                if last {
                    arrivals.disk_complete(disks.iter_mut().map(|disk| std::mem::take(&mut disk.arrived)).collect());
                }
                channel.send(&Message::RoundAck { round })?;
                if last {
                    return Ok(());
                }
            }
            other => return Err(WireError::Unexpected { found: other.name(), expected: "blocks" }.into()),
        }
    }
}
