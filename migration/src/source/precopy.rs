//! Rounds of memory and disk while the guest runs.
//!
//! One round carries what is dirty of memory and of all disks at once, each on its own channels, under one budget. It
//! ends when both are acknowledged: memory does not run ahead and send pages again and again while a large disk is still
//! on its way. After each round [`converge`] decides.

use std::time::{Duration, Instant};

use super::context::{Context, Sent};
use super::job::Job;
use super::link::{Failed, Link};
use super::postcopy;
use super::round::{Dirty, keep_alive, note, run_round};
use super::switchover::{Plan, Switchover};
use crate::error::MigrationError;
use crate::policy::{Decision, FIXED_COST, History, RoundStats, converge};
use crate::transport::tcp::TICK;

/// While the switchover is held back a round begins so often: what the guest has written meanwhile stays small.
const HELD_ROUND: Duration = Duration::from_secs(1);

/// Rounds can begin.
pub(super) struct Precopy {
    link: Link,
    sent: Sent,
    /// Round 0, until it begins.
    first: Option<Job>,
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
