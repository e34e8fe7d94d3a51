//! Rounds of memory and disk while the guest runs.
//!
//! One round carries what is dirty of memory and of all disks at once, each on its own channels, under one budget. It
//! ends when both are acknowledged: memory does not run ahead and send pages again and again while a large disk is still
//! on its way. After each round [`converge`] decides.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connect::{ping, reason_of};
use super::disk::DiskWork;
use super::memory::MemoryWork;
use super::switchover::{Plan, Switchover};
use super::workers::{Job, Share};
use super::{Context, Failed, Link, Sent, postcopy};
use crate::error::{Doing, MigrationError};
use crate::guest::{BLOCK_BYTES, MachineLayout, PAGE_BYTES};
use crate::page::Bitmap;
use crate::policy::{Decision, FIXED_COST, History, RoundStats, converge};
use crate::report::Round;
use crate::transport::tcp::TICK;
use crate::wire::handshake::Role;

/// The destination hears from this end at least so often.
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// While the switchover is held back a round begins so often: what the guest has written meanwhile stays small.
const HELD_ROUND: Duration = Duration::from_secs(1);

/// Rounds can begin.
pub(super) struct Precopy {
    link: Link,
    sent: Sent,
    /// Round 0, until it begins.
    first: Option<Job>,
}

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

impl Precopy {
    pub(super) fn new(link: Link, sent: Sent, first: Job) -> Self {
        Self { link, sent, first: Some(first) }
    }

    pub(super) fn run(mut self, context: &mut Context) -> Result<Switchover, Box<Failed>> {
        match self.rounds(context) {
            Ok(plan) => Ok(Switchover::new(self.link, self.sent, plan)),
            Err(error) => Err(Failed::new(error, Some(self.link))),
        }
    }

    fn rounds(&mut self, context: &mut Context) -> Result<Plan, MigrationError> {
        let mut job = self.first.take().ok_or(MigrationError::Bug("round 0 begins once"))?;
        let mut history = History::default();
        let mut collected = Instant::now();
        loop {
            let start = Instant::now();
            context.start_hints(job.round, &job.memory)?;
            job.mirror = context.mirror(context.options.limits.streams);
            let shares = run_round(context, &mut self.link, &job)?;
            let mut dirty = Dirty::none(&self.sent);
            dirty.collect(context, &self.sent)?;
            let elapsed = start.elapsed();
            // Longer than the round if it was held before: what was written meanwhile is among what was collected.
            let recorded = collected.elapsed();
            collected = Instant::now();
            note(context, &job, &shares, elapsed, dirty.memory.count());
            // What was read and not sent says nothing about the link.
            let block_bytes = if shares.disk.reused_bytes > 0 { 0 } else { shares.disk.data_bytes };
            history.sent((shares.memory.data_bytes, shares.memory.busy), (block_bytes, shares.disk.busy));
            history.settled(shares.disk.totals.data + shares.disk.totals.zero, shares.disk.settle);
            context.follow_changed_limits();
            let next = job.round + 1;
            let stats = self.stats(context, &mut history, &dirty, (job.round, recorded));
            context.control.set_dirty_rate(stats.dirty_bytes_per_second());
            context.check_cancelled()?;
            let decision = converge(&stats, &context.options.limits);
            tracing::info!(
                round = job.round,
                ms = elapsed.as_secs_f64() * 1e3,
                bytes = shares.memory.bytes + shares.disk.bytes,
                dirty_pages = stats.dirty_pages,
                dirty_blocks = stats.dirty_blocks,
                load = stats.load(),
                vcpu_dirty_bytes_per_second = ?stats.vcpu_dirty_bytes_per_second,
                estimated_downtime_ms = stats.estimated_downtime().as_secs_f64() * 1e3,
                ?decision,
                "round"
            );
            if wait_if_held(context, &mut self.link, &decision)? {
                history.forget_progress();
                job = dirty.into_job(next, false);
                continue;
            }
            match decision {
                Decision::Continue => job = dirty.into_job(next, false),
                Decision::MirrorWrites => {
                    context.mirror_writes()?;
                    history.forget_progress();
                    job = dirty.into_job(next, false);
                }
                Decision::Throttle { percent } => {
                    context.throttle_vcpus(&percent)?;
                    history.forget_progress();
                    job = dirty.into_job(next, false);
                }
                Decision::Switchover | Decision::ForceSwitchover => {
                    let (round, estimate) = (next, stats.estimated_downtime());
                    return Ok(Plan { dirty, round, estimate, postcopy: None });
                }
                Decision::Postcopy => {
                    let entry = postcopy::enter(context, &mut self.link, dirty)?;
                    let dirty = Dirty::none(&self.sent);
                    return Ok(Plan { dirty, round: next, estimate: FIXED_COST, postcopy: Some(entry) });
                }
                Decision::GiveUp { reason } => return Err(MigrationError::NotConverging { reason }),
            }
        }
    }

    /// What [`converge`] gets to know of a round.
    fn stats(
        &self,
        context: &Context,
        history: &mut History,
        dirty: &Dirty,
        (round, elapsed): (u32, Duration),
    ) -> RoundStats {
        let mut stats = RoundStats {
            round: round - context.held.rounds,
            elapsed,
            total_elapsed: context.spent(),
            dirty_pages: dirty.memory.count(),
            dirty_blocks: dirty.blocks(),
            memory_bytes_per_second: history.memory_bytes_per_second(),
            disk_bytes_per_second: history.disk_bytes_per_second(),
            disk_settle: history.disk_settle(),
            round_trip: self.link.round_trip,
            rounds_without_progress: 0,
            throttle_percent: context.throttling.percent(self.sent.layout.vcpus),
            vcpu_dirty_bytes_per_second: context.guest.vcpu_dirty_rates(),
            mirrors_writes: context.mirrors(),
        };
        stats.rounds_without_progress = history.remained(stats.remaining_bytes());
        stats
    }
}

/// If the operator holds the switchover back and it has come so far: waits a moment, or until it is released. True if another
/// round has to follow, since the guest has written meanwhile.
///
/// A guest that became too busy while it was held is not given up: whoever held it decides.
fn wait_if_held(context: &mut Context, link: &mut Link, decision: &Decision) -> Result<bool, MigrationError> {
    let ready = matches!(decision, Decision::Switchover | Decision::ForceSwitchover | Decision::Postcopy);
    if !context.control.is_held() {
        context.control.set_waiting(false);
        context.held.time += context.held.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        return Ok(false);
    }
    if !ready && context.held.since.is_none() {
        return Ok(false);
    }
    // Nobody knows for how long: meanwhile the guest is not slowed.
    context.release_guest();
    context.control.set_waiting(true);
    context.held.since.get_or_insert_with(Instant::now);
    context.held.rounds += 1;
    let until = Instant::now() + HELD_ROUND;
    while context.control.is_held() && Instant::now() < until {
        context.check_cancelled()?;
        keep_alive(context, link)?;
        std::thread::sleep(TICK);
    }
    Ok(true)
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
fn keep_alive(context: &Context, link: &mut Link) -> Result<(), MigrationError> {
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

impl Share {
    fn add(&mut self, other: &Share) {
        self.totals.data += other.totals.data;
        self.totals.zero += other.totals.zero;
        self.differences += other.differences;
        self.looked += other.looked;
        self.zeroes += other.zeroes;
        self.bytes += other.bytes;
        self.data_bytes += other.data_bytes;
        self.skipped_bytes += other.skipped_bytes;
        self.mirrored += other.mirrored;
        self.busy = self.busy.max(other.busy);
        self.settle = self.settle.max(other.settle);
    }

    /// What was carried after this, in the same round and on the same channel.
    pub(super) fn follow(&mut self, next: &Share) {
        let busy = self.busy + next.busy + next.settle;
        self.add(next);
        (self.busy, self.settle) = (busy, next.settle);
    }
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
