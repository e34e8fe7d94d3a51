//! What a migration may cost, and what to do next after each round.
//!
//! [`converge`] is a pure function: it reads no clock and does no I/O, so that it is tested over simulated guests.
//!
//! ```text
//!                    fits = estimated downtime <= limit
//!
//!                 fits                                   does not fit
//!   another round would shorten   otherwise     rounds, time and progress left   otherwise
//!   the downtime by a fifth and       |                 |                            |
//!   by half a millisecond             |                 |                            |
//!            |                        |                 |                            |
//!         Continue               Switchover     MirrorWrites if blocks      ForceSwitchover if the
//!                                               alone would not fit, not    operator allowed it,
//!                                               coming closer;              else Postcopy if both
//!                                               Throttle if allowed, not    the operator and the
//!                                               coming closer (or not in    destination allow it,
//!                                               time), and holding vCPUs    else GiveUp
//!                                               harder would help;
//!                                               else Continue
//! ```
//!
//! How hard which vCPU is held is computed in [`crate::throttle`]; what mirroring does is told in [`crate::mirror`].
//!
//! With [`MigrationMode::Postcopy`] the answer is `Postcopy` after the first round.
//!
//! The estimate counts everything that happens while the guest is stopped: stopping it, the pages and blocks that are
//! still dirty at the bandwidth measured in this migration, the flush of the last blocks, two round trips (state until Prepared, Commit until Resumed),
//! state and resume.

mod limits;
mod measured;

use std::time::Duration;

pub use limits::{Limits, MigrationMode};
use measured::PROGRESS;
pub use measured::{FIXED_COST, History, RoundStats};

use crate::throttle;

/// So many rounds in a row without coming closer, and it does not converge.
pub const STUCK_ROUNDS: u32 = 3;

/// So many of them, and writes are mirrored, or vCPUs are held, where that is allowed.
const HOLD_ROUNDS: u32 = 2;

/// Another round is worth it if it shortens the downtime by this share ...
const WORTHWHILE_SHARE: f64 = 0.2;

/// ... and by this much.
const WORTHWHILE: Duration = Duration::from_micros(500);

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round.
    Continue,
    /// Another round, with the guest's writes to its disks answered when they have arrived, from now on.
    MirrorWrites,
    /// Another round, with vCPUs held from now on.
    Throttle {
        /// For each vCPU the share of its time in per cent.
        percent: Vec<u8>,
    },
    /// Stop the guest and finish: the downtime is expected to fit.
    Switchover,
    /// Stop the guest and finish although it will take longer than the limit: the operator allowed it.
    ForceSwitchover,
    /// Stop the guest, let it run at the destination, and send the rest after it.
    Postcopy,
    /// End the migration, the guest unharmed.
    GiveUp {
        /// Measured rates, and what to do.
        reason: String,
    },
}

/// Decides what follows a round. Pure; see the module.
pub fn converge(stats: &RoundStats, limits: &Limits) -> Decision {
    if limits.mode == MigrationMode::Postcopy {
        return Decision::Postcopy;
    }
    let now = stats.estimated_downtime();
    let last = stats.round + 1 >= limits.max_rounds || stats.total_elapsed >= limits.timeout;
    let stuck = stats.rounds_without_progress >= STUCK_ROUNDS;
    if now <= limits.downtime {
        let gain = now.saturating_sub(stats.estimated_after_another_round());
        let worthwhile = gain >= WORTHWHILE && gain.as_secs_f64() >= now.as_secs_f64() * WORTHWHILE_SHARE;
        return if worthwhile && !last && stats.rounds_without_progress == 0 {
            Decision::Continue
        } else {
            Decision::Switchover
        };
    }
    if !last && blocks_diverge(stats, limits) {
        return Decision::MirrorWrites;
    }
    if !last && let Some(percent) = throttle(stats, limits) {
        return Decision::Throttle { percent };
    }
    if !last && !stuck {
        return Decision::Continue;
    }
    if limits.force_switchover {
        return Decision::ForceSwitchover;
    }
    if limits.mode == MigrationMode::Hybrid {
        return Decision::Postcopy;
    }
    Decision::GiveUp { reason: not_converging(stats, limits, now) }
}

/// Whether blocks alone, which come back as fast as they are sent, would keep the switchover from fitting.
fn blocks_diverge(stats: &RoundStats, limits: &Limits) -> bool {
    let alone = stats.downtime_for(0.0, stats.dirty_blocks as f64) > limits.downtime;
    // Nothing is gained if it is the flush of a single block.
    let useful = stats.mirrors_writes == Some(false) && stats.downtime_for(0.0, 1.0) < limits.downtime;
    let slow = stats.disk_load() >= PROGRESS || stats.rounds_without_progress >= HOLD_ROUNDS;
    alone && useful && slow && stats.round > 0
}

/// The shares by which vCPUs are to be held, if others than now.
fn throttle(stats: &RoundStats, limits: &Limits) -> Option<Vec<u8>> {
    let held = stats.throttle_percent.iter().any(|&percent| percent > 0);
    // Round 0 tells little: everything was on its way, and the guest had all that time.
    let useful = stats.round > 0 && stats.fixed_downtime() < limits.downtime;
    let slow = stats.load() < PROGRESS && !stats.in_time(limits);
    let needed = useful && (slow || stats.rounds_without_progress >= HOLD_ROUNDS);
    (held || limits.throttle_max_percent > 0 && needed).then(|| throttle::raise(stats, limits)).flatten()
}

fn not_converging(stats: &RoundStats, limits: &Limits, now: Duration) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    let rate = |value: Option<f64>| value.map_or("unknown".to_owned(), |rate| format!("{:.0} MiB/s", rate / MIB));
    let most = stats.throttle_percent.iter().copied().max().unwrap_or(0);
    let held = if most > 0 { format!(", and vCPUs were held for up to {most} % of their time") } else { String::new() };
    let throttling = if limits.throttle_max_percent > 0 { "more throttling" } else { "throttling of its vCPUs" };
    format!(
        "it does not converge: after {} rounds the guest still dirties {:.0} MiB/s ({} pages, {} blocks left) while the link carries \
         memory at {} and disk at {}; a switchover now would stop it for about {} ms, {} ms are allowed{held}: allow a longer \
         downtime, more bandwidth, {throttling}, or force the switchover",
        stats.round + 1,
        stats.dirty_bytes_per_second() / MIB,
        stats.dirty_pages,
        stats.dirty_blocks,
        rate(stats.memory_bytes_per_second),
        rate(stats.disk_bytes_per_second),
        now.as_millis(),
        limits.downtime.as_millis(),
    )
}

#[cfg(test)]
mod tests;
