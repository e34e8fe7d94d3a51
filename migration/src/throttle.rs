//! How much of its time a vCPU has to be held so that pre-copy converges.
//!
//! The guest dirties faster than the link carries: what remains does not shrink from round to round. Held for a share of its
//! time a vCPU dirties that much less. The share follows from what was measured, and each further round corrects it:
//!
//! * the *load* is the link's time that is needed for what the guest dirties in a second (memory and disks). Below 1 what
//!   remains shrinks by that factor each round; the aim is [`TARGET_LOAD`], or less where the round trip, in which the guest
//!   dirties as well, keeps what remains above what fits into the downtime;
//! * where the host knows what each vCPU dirties ([`RoundStats::vcpu_dirty_bytes_per_second`]) the room is given out
//!   as water is poured: every vCPU may dirty up to the same rate, those that dirty less are not held at all;
//! * where it does not, or where it is not the vCPUs' own writes that fill the link, all are held alike.
//!
//! A guest that rewrites all of its working set in a round looks as if it dirtied just as fast as the link carries, however
//! fast it is: the log says which pages were written and not how often. So the first share may be too small, the next round
//! shows it, and the share that a vCPU may still run is halved again: six rounds until it runs 1 % of its time.
//!
//! Shares only grow in one migration, unless the operator lowers the most that is allowed: nothing swings.

use crate::policy::{Limits, RoundStats};

/// With throttling a round takes this share of the time of the one before, and leaves that share of its bytes. A smaller
/// one holds the guest harder and for a shorter time: at twice the link's rate half of the load costs the guest 1.5 times
/// the round it began with, 0.8 would cost 3 times it, 0.25 1.2 times it at the price of seven eighths of its speed.
pub const TARGET_LOAD: f64 = 0.5;

/// Most that can be asked for: a vCPU that never runs answers nobody.
pub const PERCENT_MAX: u8 = 99;

/// Shares are raised only if what is left to a vCPU shrinks to this part or less, or to the least that is allowed.
const WORTHWHILE: f64 = 0.8;

/// Of the load at which what remains would just fit.
const MARGIN: f64 = 0.8;

/// The shares in per cent, one a vCPU, that the next round needs; `None` if those in force are right, or more than they
/// cannot be.
pub fn raise(stats: &RoundStats, limits: &Limits) -> Option<Vec<u8>> {
    let most = limits.throttle_max_percent.min(PERCENT_MAX);
    let now = &stats.throttle_percent;
    if now.iter().any(|&percent| percent > most) {
        return Some(now.iter().map(|&percent| percent.min(most)).collect());
    }
    let load = stats.load();
    let aim = aim(stats, limits);
    if load.is_nan() || load <= aim {
        return None;
    }
    let wanted = each_by_its_rate(stats, load, aim).unwrap_or_else(|| all_alike(now, load, aim));
    let wanted: Vec<u8> = wanted.into_iter().zip(now).map(|(run, &now)| percent(run).min(most).max(now)).collect();
    let worthwhile = wanted
        .iter()
        .zip(now)
        .any(|(&wanted, &now)| wanted > now && (wanted == most || running(wanted) <= running(now) * WORTHWHILE));
    worthwhile.then_some(wanted)
}

/// The share of its time that a held vCPU may run.
fn running(percent: u8) -> f64 {
    f64::from(100 - percent.min(100)) / 100.0
}

fn percent(running: f64) -> u8 {
    // Rounded up, so that the aim is met; a float to integer cast saturates.
    ((1.0 - running) * 100.0 - 1e-6).ceil().clamp(0.0, 100.0) as u8
}

/// The load at which rounds shrink to what fits. A round takes what it sends and a round trip `t`, so that with a load of `l`
/// the rounds approach one in which sending takes `l t / (1 - l)`. That has to fit into what the downtime leaves for sending.
fn aim(stats: &RoundStats, limits: &Limits) -> f64 {
    let trip = stats.round_trip.as_secs_f64();
    let room = limits.downtime.saturating_sub(stats.fixed_downtime()).as_secs_f64();
    let fits = if room + trip > 0.0 { room / (room + trip) } else { 1.0 };
    TARGET_LOAD.min(fits * MARGIN)
}

fn all_alike(now: &[u8], load: f64, aim: f64) -> Vec<f64> {
    now.iter().map(|&percent| running(percent) * aim / load).collect()
}

/// Time that each vCPU may run, if it is known what each dirties and if that is what fills the link.
fn each_by_its_rate(stats: &RoundStats, load: f64, aim: f64) -> Option<Vec<f64>> {
    let rates = &stats.vcpu_dirty_bytes_per_second;
    let link = stats.memory_bytes_per_second.filter(|&rate| rate > 0.0)?;
    if rates.is_empty() || rates.len() != stats.throttle_percent.len() {
        return None;
    }
    // What each would dirty if it were not held.
    let free: Vec<f64> =
        rates.iter().zip(&stats.throttle_percent).map(|(rate, &now)| rate.max(0.0) / link / running(now)).collect();
    // Blocks, and pages that devices wrote.
    let others = (load - rates.iter().sum::<f64>() / link).max(0.0).max(stats.disk_load());
    let room = aim - others;
    if room < aim / 2.0 {
        return None;
    }
    let level = water_level(&free, room);
    Some(free.into_iter().map(|load| if load > level { level / load } else { 1.0 }).collect())
}

/// The level `l` at which the sum of `min(load, l)` over all loads is `room`.
fn water_level(loads: &[f64], room: f64) -> f64 {
    let mut sorted = loads.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mut room = room;
    for (index, &load) in sorted.iter().enumerate() {
        let each = room / (sorted.len() - index) as f64;
        if load >= each {
            return each;
        }
        room -= load;
    }
    f64::INFINITY
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LINK: f64 = 1e9;

    fn raise(stats: &RoundStats, most: u8) -> Option<Vec<u8>> {
        super::raise(stats, &Limits { throttle_max_percent: most, ..Limits::default() })
    }

    /// A second in which pages worth `load` of the link were dirtied.
    fn stats(load: f64, vcpus: &[f64], now: &[u8]) -> RoundStats {
        RoundStats {
            elapsed: Duration::from_secs(1),
            dirty_pages: (load * LINK / 4096.0) as u64,
            memory_bytes_per_second: Some(LINK),
            throttle_percent: now.to_vec(),
            vcpu_dirty_bytes_per_second: vcpus.iter().map(|share| share * LINK).collect(),
            ..RoundStats::default()
        }
    }

    #[test]
    fn only_the_vcpus_that_dirty_are_held() {
        assert_eq!(raise(&stats(1.0, &[2.0, 0.01, 0.0], &[0, 0, 0]), 99), Some(vec![76, 0, 0]));
        assert_eq!(raise(&stats(1.0, &[1.0, 1.0], &[0, 0]), 99), Some(vec![75, 75]), "both alike");
        assert_eq!(
            raise(&stats(1.0, &[1.0, 0.2], &[0, 0]), 99),
            Some(vec![70, 0]),
            "what one leaves the other may use"
        );
    }

    #[test]
    fn all_are_held_alike_where_nobody_knows_who_dirties() {
        assert_eq!(raise(&stats(1.0, &[], &[0, 0]), 99), Some(vec![50, 50]));
        assert_eq!(raise(&stats(2.0, &[], &[0, 0]), 99), Some(vec![75, 75]));
        // Devices wrote most of it, or there are rates of other vCPUs than these.
        assert_eq!(raise(&stats(2.0, &[0.1, 0.1], &[0, 0]), 99), Some(vec![75, 75]));
        assert_eq!(raise(&stats(2.0, &[2.0], &[0, 0]), 99), Some(vec![75, 75]));
    }

    #[test]
    fn a_share_that_is_not_enough_grows_and_one_that_is_stays() {
        assert_eq!(raise(&stats(1.0, &[], &[50]), 99), Some(vec![75]));
        assert_eq!(raise(&stats(0.5, &[], &[50]), 99), None);
        assert_eq!(raise(&stats(0.6, &[], &[50]), 99), None, "not worth a change");
        assert_eq!(raise(&stats(0.5, &[0.5], &[75]), 99), None, "the aim is met");
    }

    #[test]
    fn never_more_than_allowed() {
        assert_eq!(raise(&stats(9.0, &[], &[0]), 40), Some(vec![40]));
        assert_eq!(raise(&stats(9.0, &[], &[0]), 5), Some(vec![5]));
        assert_eq!(raise(&stats(9.0, &[], &[40]), 40), None);
        assert_eq!(raise(&stats(900.0, &[], &[0]), 255), Some(vec![PERCENT_MAX]));
        assert_eq!(raise(&stats(9.0, &[9.0, 0.0], &[40, 0]), 20), Some(vec![20, 0]), "lowered by the operator");
        assert_eq!(raise(&stats(9.0, &[], &[0]), 0), None);
    }

    /// 17 ms of round trip, in each of which the guest goes on: 12 ms are left for sending.
    #[test]
    fn a_long_way_needs_a_smaller_load() {
        let stats = RoundStats { round_trip: Duration::from_millis(17), ..stats(1.0, &[], &[0]) };
        assert_eq!(raise(&stats, 99), Some(vec![67]));
    }

    #[test]
    fn a_saturated_working_set_is_held_harder_for_six_rounds() {
        let mut now = vec![0];
        let mut rounds = 0;
        while let Some(next) = raise(&stats(1.0, &[], &now), 99) {
            assert!(next[0] > now[0]);
            (now, rounds) = (next, rounds + 1);
        }
        assert_eq!((now[0], rounds), (PERCENT_MAX, 6));
    }
}
