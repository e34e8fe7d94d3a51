//! Rounds: recording what the guest writes, handing it to the channels, waiting until it has arrived.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::context::{Context, Sent};
use super::job::{DiskWork, Job, MemoryWork, Share};
use super::link::{Link, ping, reason_of};
use crate::error::{Doing, MigrationError};
use crate::guest::{BLOCK_BYTES, MachineLayout, PAGE_BYTES};
use crate::page::Bitmap;
use crate::report::Round;
use crate::transport::tcp::TICK;
use crate::wire::handshake::Role;

/// The destination hears from this end at least so often.
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// What the guest has written and the destination does not have yet.
pub(super) struct Dirty {
    pub(super) memory: Bitmap,
    pub(super) disks: Vec<Bitmap>,
}

/// Both kinds of channel in one round.
#[derive(Clone, Copy, Debug)]
pub(super) struct RoundShares {
    pub(super) memory: Share,
    pub(super) disk: Share,
    /// When the last page and the last block were acknowledged.
    pub(super) memory_at: Instant,
    pub(super) disk_at: Instant,
}

impl Dirty {
    pub(super) fn none(sent: &Sent) -> Self {
        Self {
            memory: Bitmap::new(sent.layout.pages()),
            disks: sent.layout.disks.iter().map(|disk| Bitmap::new(disk.blocks())).collect(),
        }
    }

    /// Adds what was written since the last call. Hints of free pages that were asked for before end here.
    pub(super) fn collect(&mut self, context: &Context, sent: &Sent) -> Result<(), MigrationError> {
        context.stop_hints()?;
        context.guest.collect_dirty(&mut self.memory).doing("collecting dirty pages")?;
        // They are in use again, and will be sent.
        sent.skipped.subtract(&self.memory);
        for (disk, bitmap) in context.guest.disks().iter().zip(&mut self.disks) {
            disk.collect_dirty(bitmap).doing("collecting dirty blocks")?;
        }
        Ok(())
    }

    pub(super) fn blocks(&self) -> u64 {
        self.disks.iter().map(Bitmap::count).sum()
    }

    pub(super) fn into_job(self, round: u32, last: bool) -> Job {
        let mirror = None;
        let (memory, disk) = (Arc::new(MemoryWork::new(self.memory)), Arc::new(DiskWork::dirty(self.disks)));
        Job { round, last, memory, disk, mirror }
    }
}

/// Has the guest's writes recorded from here on. Whatever was recorded before (by an earlier migration that failed) is part
/// of round 0.
pub(super) fn start_tracking(context: &mut Context) -> Result<(), MigrationError> {
    context.done.tracking = true;
    context.guest.start_dirty_tracking().doing("starting to track dirty pages")?;
    for disk in context.guest.disks() {
        disk.start_dirty_tracking().doing("starting to track dirty blocks")?;
    }
    Ok(())
}

/// Round 0: all of memory and of the disks that may hold anything. Called when writes are recorded already, so that what is
/// populated later is not missed.
pub(super) fn everything(context: &Context, layout: &MachineLayout) -> Result<Job, MigrationError> {
    let pages = layout.pages();
    let (mut memory, mut from) = (Bitmap::new(pages), 0);
    while let Some(run) = context.guest.next_populated(from).doing("looking for populated memory")? {
        if run.end <= from || run.start >= pages {
            break;
        }
        from = run.end;
        memory.insert_range(run);
    }
    let disk = DiskWork::everything(&context.guest.disks(), &layout.disks)?;
    let (memory, disk) = (Arc::new(MemoryWork::new(memory)), Arc::new(disk));
    Ok(Job { round: 0, last: false, memory, disk, mirror: None })
}

/// Hands a round to the channels and waits until all of it is acknowledged.
pub(super) fn run_round(context: &Context, link: &mut Link, job: &Job) -> Result<RoundShares, MigrationError> {
    let remaining = job.memory.count() * PAGE_BYTES + job.disk.count() * BLOCK_BYTES;
    context.control.set_round(job.round, remaining);
    let waiting = link.workers.start_round(job)?;
    wait_round(context, link, waiting)
}

/// Waits for a round that has been started.
pub(super) fn wait_round(context: &Context, link: &mut Link, waiting: usize) -> Result<RoundShares, MigrationError> {
    let now = Instant::now();
    let mut shares = RoundShares { memory: Share::default(), disk: Share::default(), memory_at: now, disk_at: now };
    let mut left = waiting;
    while left > 0 {
        match link.workers.finished(TICK) {
            Ok(Some((Role::Disk, share, at))) => {
                (shares.disk, shares.disk_at) = (share, at);
                left -= 1;
            }
            Ok(Some((_, share, at))) => {
                shares.memory.add(&share);
                shares.memory_at = shares.memory_at.max(at);
                left -= 1;
            }
            Ok(None) => check_time(context)?,
            Err(error) => {
                context.check_cancelled()?;
                return Err(match error {
                    MigrationError::Transport(error) if error.is_link() => reason_of(&mut link.control, error.into()),
                    other => other,
                });
            }
        }
        keep_alive(context, link)?;
    }
    Ok(shares)
}

/// Says something if nothing was said for a while.
pub(super) fn keep_alive(context: &Context, link: &mut Link) -> Result<(), MigrationError> {
    if !context.done.paused && link.heard.elapsed() > KEEP_ALIVE {
        let trip = ping(&mut link.control, link.heard.elapsed().as_nanos() as u64)?;
        link.round_trip = link.round_trip.min(trip);
        link.heard = Instant::now();
    }
    Ok(())
}

/// Fails if the migration was cancelled, takes too long, or holds the guest for too long.
fn check_time(context: &Context) -> Result<(), MigrationError> {
    context.check_cancelled()?;
    let limit = context.options.limits.timeout;
    if !context.done.paused && context.held.since.is_none() && context.spent() > limit {
        return Err(MigrationError::TimedOut { after: limit });
    }
    if context.done.pause_limit.is_some_and(|limit| Instant::now() > limit) {
        return Err(MigrationError::PausedTooLong);
    }
    Ok(())
}

/// Puts a round into the report.
pub(super) fn note(context: &mut Context, job: &Job, shares: &RoundShares, elapsed: Duration, dirty_after: u64) {
    let report = &mut context.report;
    let round = Round {
        pages: shares.memory.looked,
        bytes: shares.memory.bytes,
        zero_pages: shares.memory.zeroes,
        ms: elapsed.as_secs_f64() * 1e3,
        dirty_pages_after: dirty_after,
    };
    match report.rounds.last_mut().filter(|_| context.held.rounds > 1 && context.held.since.is_some()) {
        // It may be held for days: its rounds are one in the report.
        Some(held) => {
            held.pages += round.pages;
            held.bytes += round.bytes;
            held.zero_pages += round.zero_pages;
            held.ms += round.ms;
            held.dirty_pages_after = round.dirty_pages_after;
        }
        None => report.rounds.push(round),
    }
    let memory = &mut report.memory;
    let busy = memory.bytes_sent as f64 / memory.throughput_bytes_per_second.max(1.0);
    memory.bytes_sent += shares.memory.bytes;
    memory.pages_delta += shares.memory.differences;
    let busy = if memory.throughput_bytes_per_second > 0.0 { busy } else { 0.0 } + shares.memory.busy.as_secs_f64();
    if busy > 0.0 {
        memory.throughput_bytes_per_second = memory.bytes_sent as f64 / busy;
    }
    report.disk.bytes_sent += shares.disk.bytes;
    report.disk.bytes_skipped += shares.disk.skipped_bytes;
    report.disk.bytes_reused += shares.disk.reused_bytes;
    report.disk.mirrored += shares.disk.mirrored;
    if job.disk.count() > 0 {
        report.disk.rounds += 1;
    }
}

/// Ends the recording of written pages and blocks.
pub(super) fn stop_tracking(context: &mut Context) {
    if !std::mem::take(&mut context.done.tracking) {
        return;
    }
    if let Err(error) = context.guest.stop_dirty_tracking() {
        tracing::warn!(%error, "dirty pages are still tracked");
    }
    for disk in context.guest.disks() {
        if let Err(error) = disk.stop_dirty_tracking() {
            tracing::warn!(%error, "dirty blocks are still tracked");
        }
    }
}
