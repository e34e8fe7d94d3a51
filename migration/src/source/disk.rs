//! The disk channel at the source: blocks of all disks, with many reads in flight.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::context::{Context, Sent};
use super::job::{Carry, DiskWork, Job, Share};
use super::reuse::{Held, Windows};
use crate::blocks;
use crate::control::Control;
use crate::error::{Doing, MigrationError};
use crate::guest::{BLOCK_BYTES, BlockReader, DiskLayout, SourceDisk};
use crate::page::{Bitmap, Digests, digest, is_zero, zero_block};
use crate::transport::TransportError;
use crate::transport::channels::Channel;
use crate::transport::limiter::Limiter;
use crate::transport::stop::Stop;
use crate::transport::tcp::TICK;
use crate::urgency::Turns;
use crate::wire::message::Message;

struct OneDisk {
    number: u16,
    source: Arc<dyn SourceDisk>,
    layout: DiskLayout,
    reader: Box<dyn BlockReader>,
    digests: Arc<Digests>,
}

pub(super) struct DiskWorker {
    /// The destination holds something already.
    reuse: bool,
    disks: Vec<OneDisk>,
    control: Control,
    stop: Stop,
    limiter: Arc<Limiter>,
    turns: Turns,
}

impl DiskWorker {
    pub(super) fn new(
        context: &Context,
        sent: &Sent,
        limiter: Arc<Limiter>,
        reuse: bool,
    ) -> Result<Self, MigrationError> {
        let mut disks = Vec::new();
        let sources = context.guest.disks();
        if sources.len() != sent.layout.disks.len() {
            let text = format!("the machine has {} disks, its layout {}", sources.len(), sent.layout.disks.len());
            return Err(MigrationError::Options(text));
        }
        for (number, ((disk, layout), digests)) in sources.iter().zip(&sent.layout.disks).zip(&sent.disks).enumerate() {
            disks.push(OneDisk {
                number: number as u16,
                source: Arc::clone(disk),
                layout: layout.clone(),
                reader: disk.reader().doing("opening a disk for reading")?,
                digests: Arc::clone(digests),
            });
        }
        Ok(Self {
            reuse,
            disks,
            control: context.control.clone(),
            stop: context.stop.clone(),
            limiter,
            turns: Turns::new(),
        })
    }
}

impl Carry for DiskWorker {
    fn carry(&mut self, job: &Job, channel: &mut Channel) -> Result<Share, MigrationError> {
        let mut share = Share::default();
        let Self { reuse, disks, control, stop, limiter, turns } = self;
        let mut turns = if job.last { None } else { Some(turns) };
        for (disk, (data, holes)) in disks.iter_mut().zip(job.disk.data.iter().zip(&job.disk.holes)) {
            let turns = turns.as_deref_mut();
            let mut out = Outgoing { channel: &mut *channel, share: &mut share, control, stop, limiter, turns };
            disk.holes(holes, &mut out)?;
            // Later rounds carry what was written since.
            if *reuse && job.round == 0 {
                disk.blocks_not_held(data, &mut out)?;
            } else {
                disk.blocks(data, 0..data.len(), None, &mut out)?;
            }
        }
        channel.flush()?;
        if job.mirror.is_some() {
            share.mirrored = share.totals.data + share.totals.zero;
        }
        Ok(share)
    }

    fn acknowledged(&mut self, job: &Job) {
        if job.mirror.is_some() {
            self.disks.iter().for_each(|disk| disk.source.mirrored());
        }
    }

    fn carry_on(&mut self, job: &Job, channel: &mut Channel) -> Result<Option<Share>, MigrationError> {
        let Some(mirror) = job.mirror.as_ref().filter(|_| !job.last) else { return Ok(None) };
        while mirror.wait(TICK) {
            if self.stop.is_raised() {
                return Err(TransportError::Stopped.into());
            }
            let (start, mut dirty) = (Instant::now(), Vec::new());
            for disk in &self.disks {
                let mut blocks = Bitmap::new(disk.layout.blocks());
                disk.source.collect_dirty(&mut blocks).doing("collecting dirty blocks")?;
                dirty.push(blocks);
            }
            if dirty.iter().all(Bitmap::is_empty) {
                continue;
            }
            let more = Job { disk: Arc::new(DiskWork::dirty(dirty)), ..job.clone() };
            let mut share = self.carry(&more, channel)?;
            share.busy = start.elapsed();
            return Ok(Some(share));
        }
        Ok(None)
    }
}

/// Where blocks go, and what is counted on the way.
struct Outgoing<'a> {
    channel: &'a mut Channel,
    share: &'a mut Share,
    control: &'a Control,
    stop: &'a Stop,
    limiter: &'a Limiter,
    /// Unless the guest waits.
    turns: Option<&'a mut Turns>,
}

impl Outgoing<'_> {
    fn zeroes(&mut self, disk: u16, blocks: Range<u64>, bytes: u64) -> Result<(), MigrationError> {
        let count = blocks.end - blocks.start;
        self.channel.queue(&Message::ZeroBlocks { disk, first: blocks.start, count })?;
        self.share.totals.zero += count;
        self.share.skipped_bytes += bytes;
        Ok(())
    }

    fn block(&mut self, disk: u16, block: u64, bytes: &[u8]) -> Result<(), MigrationError> {
        if self.stop.is_raised() {
            return Err(TransportError::Stopped.into());
        }
        self.channel.held_back(self.limiter.wait(|| self.stop.is_raised()));
        let sent = self.channel.send_block(disk, block, bytes)?;
        self.limiter.charge(sent);
        self.share.totals.data += 1;
        self.share.bytes += sent;
        self.share.data_bytes += bytes.len() as u64;
        self.control.progress(sent, bytes.len() as u64);
        if let Some(turns) = &mut self.turns {
            turns.pass();
        }
        Ok(())
    }
}

impl OneDisk {
    fn holes(&mut self, holes: &[Range<u64>], out: &mut Outgoing<'_>) -> Result<(), MigrationError> {
        for hole in holes {
            for block in hole.clone() {
                self.digests.set(block, zero_block(self.layout.block_bytes(block)));
            }
            let end = (hole.end * BLOCK_BYTES).min(self.layout.bytes);
            out.zeroes(self.number, hole.clone(), end - hole.start * BLOCK_BYTES)?;
        }
        Ok(())
    }

    /// As [`OneDisk::blocks`] for all of `data`, without those that the destination holds.
    fn blocks_not_held(&mut self, data: &Bitmap, out: &mut Outgoing<'_>) -> Result<(), MigrationError> {
        let mut windows = Windows::new(self.number, data, out.channel)?;
        while let Some((window, held)) = windows.next(out.channel)? {
            self.blocks(data, window, Some(&held), out)?;
        }
        self.blocks(data, windows.end()..data.len(), None, out)
    }

    fn blocks(
        &mut self,
        data: &Bitmap,
        range: Range<u64>,
        held: Option<&Held>,
        out: &mut Outgoing<'_>,
    ) -> Result<(), MigrationError> {
        let Self { number, layout, reader, digests, .. } = self;
        blocks::read(&mut **reader, layout, data.numbers(range), |block, bytes| {
            if is_zero(bytes) {
                digests.set(block, zero_block(bytes.len() as u64));
                out.control.progress(0, bytes.len() as u64);
                return out.zeroes(*number, block..block + 1, bytes.len() as u64);
            }
            digests.set(block, digest(bytes));
            if held.is_some_and(|held| held.is(block, bytes)) {
                out.share.reused_bytes += bytes.len() as u64;
                out.control.progress(0, bytes.len() as u64);
                return Ok(());
            }
            out.block(*number, block, bytes)
        })
    }
}
