//! The policy over simulated guests: several processors with working sets, hot pages and bursts, a disk, and a link.

use std::time::Duration;

use migration::guest::{BLOCK_BYTES, PAGE_BYTES};
use migration::policy::{Decision, FIXED_COST, History, Limits, MigrationMode, RoundStats, converge};
use proptest::prelude::*;

const MIB: f64 = 1024.0 * 1024.0;

/// Sweeps its working set, and writes to its hot pages besides, at fixed rates but for bursts.
#[derive(Clone, Debug)]
struct Vcpu {
    working_set_mib: f64,
    mib_s: f64,
    hot_mib: f64,
    hot_mib_s: f64,
    /// It writes so many times as fast in every other of these seconds.
    burst: f64,
    burst_s: f64,
}

#[derive(Clone, Debug)]
struct Guest {
    memory_mib: f64,
    vcpus: Vec<Vcpu>,
    disk_mib: f64,
    disk_mib_s: f64,
    link_mib_s: f64,
    round_trip: Duration,
    /// Whether its host can tell what each vCPU dirties.
    tells: bool,
}

impl Vcpu {
    /// Seconds of its normal rate in the time from `from` to `to`.
    fn effort(&self, from: f64, to: f64) -> f64 {
        let until = |t: f64| {
            let (whole, rest) = ((t / self.burst_s / 2.0).floor(), (t / self.burst_s) % 2.0);
            self.burst_s * (whole * (1.0 + self.burst) + rest.min(1.0) * self.burst + (rest - 1.0).max(0.0))
        };
        until(to) - until(from)
    }

    /// MiB of different pages that it writes in a time, and MiB per second that it would if its sets were endless.
    fn writes(&self, from: f64, to: f64, running: f64) -> (f64, f64) {
        let effort = self.effort(from, to) * running;
        let different = (effort * self.mib_s).min(self.working_set_mib) + (effort * self.hot_mib_s).min(self.hot_mib);
        (different, effort * (self.mib_s + self.hot_mib_s) / (to - from))
    }
}

#[derive(Debug)]
struct End {
    decision: Decision,
    rounds: u32,
    time: Duration,
    last_round: Duration,
    downtime: Duration,
    throttles: Vec<Vec<u8>>,
}

fn running(percent: u8) -> f64 {
    f64::from(100 - percent) / 100.0
}

fn simulate(guest: &Guest, limits: &Limits) -> End {
    let (mut memory, mut disk, mut now) = (guest.memory_mib, guest.disk_mib, 0.0);
    let mut history = History::default();
    let mut percent = vec![0; guest.vcpus.len()];
    let mut throttles = Vec::new();
    for round in 0.. {
        assert!(round < limits.max_rounds, "went on past the last round");
        let (memory_s, disk_s) = (memory / guest.link_mib_s, disk / guest.link_mib_s);
        let elapsed = memory_s + disk_s + guest.round_trip.as_secs_f64().max(1e-4);
        let duration = Duration::from_secs_f64;
        history.sent(((memory * MIB) as u64, duration(memory_s)), ((disk * MIB) as u64, duration(disk_s)));
        let wrote: Vec<(f64, f64)> = guest
            .vcpus
            .iter()
            .zip(&percent)
            .map(|(vcpu, &percent)| vcpu.writes(now, now + elapsed, running(percent)))
            .collect();
        now += elapsed;
        memory = wrote.iter().map(|(different, _)| different).sum::<f64>().min(guest.memory_mib);
        // Its first vCPU drives the disk.
        disk = (elapsed * guest.disk_mib_s * running(percent[0])).min(guest.disk_mib);
        let mut stats = RoundStats {
            round,
            elapsed: duration(elapsed),
            total_elapsed: duration(now),
            dirty_pages: (memory * MIB / PAGE_BYTES as f64) as u64,
            dirty_blocks: (disk * MIB / BLOCK_BYTES as f64) as u64,
            memory_bytes_per_second: history.memory_bytes_per_second(),
            disk_bytes_per_second: history.disk_bytes_per_second(),
            disk_settle: Duration::ZERO,
            round_trip: guest.round_trip,
            rounds_without_progress: 0,
            throttle_percent: percent.clone(),
            vcpu_dirty_bytes_per_second: Vec::new(),
            mirrors_writes: None,
        };
        if guest.tells {
            stats.vcpu_dirty_bytes_per_second = wrote.iter().map(|(_, rate)| rate * MIB).collect();
        }
        stats.rounds_without_progress = history.remained(stats.remaining_bytes());
        match converge(&stats, limits) {
            Decision::Continue => {}
            Decision::Throttle { percent: next } => {
                history.forget_progress();
                percent.clone_from(&next);
                throttles.push(next);
            }
            decision => {
                let downtime = duration((memory + disk) / guest.link_mib_s) + guest.round_trip * 2 + FIXED_COST;
                let (time, last_round) = (duration(now), duration(elapsed));
                return End { decision, rounds: round + 1, time, last_round, downtime, throttles };
            }
        }
    }
    unreachable!()
}

/// One that dirties up to three times what the link carries, if it were alone.
fn vcpus(most: usize) -> impl Strategy<Value = Vec<(f64, f64, f64, f64, f64, f64)>> {
    prop::collection::vec((0.0..1.0f64, 0.0..3.0f64, 0.0..0.1f64, 0.0..3.0f64, 1.0..4.0f64, 0.05..20.0f64), 1..=most)
}

fn guests() -> impl Strategy<Value = Guest> {
    (64.0..4096.0f64, vcpus(4), 0.0..4096.0f64, 0.0..1.0f64, 10.0..3000.0f64, 0u64..20_000, any::<bool>()).prop_map(
        |(memory_mib, vcpus, disk_mib, disk, link_mib_s, round_trip, tells)| {
            let share = 1.0 / vcpus.len() as f64;
            let one = |(set, rate, hot, hot_rate, burst, burst_s)| Vcpu {
                working_set_mib: memory_mib * set * share,
                mib_s: link_mib_s * rate,
                hot_mib: memory_mib * hot * share,
                hot_mib_s: link_mib_s * hot_rate,
                burst,
                burst_s,
            };
            Guest {
                memory_mib,
                vcpus: vcpus.into_iter().map(one).collect(),
                disk_mib,
                disk_mib_s: link_mib_s * disk,
                link_mib_s,
                round_trip: Duration::from_micros(round_trip),
                tells,
            }
        },
    )
}

fn limits() -> impl Strategy<Value = Limits> {
    (5u64..2000, 1u32..40, 1u64..600, prop_oneof![Just(0u8), 1..=99u8], any::<bool>(), any::<bool>()).prop_map(
        |(downtime_ms, max_rounds, timeout_s, throttle_max_percent, hybrid, force_switchover)| Limits {
            downtime: Duration::from_millis(downtime_ms),
            max_rounds,
            timeout: Duration::from_secs(timeout_s),
            throttle_max_percent,
            mode: if hybrid { MigrationMode::Hybrid } else { MigrationMode::Precopy },
            force_switchover,
            ..Limits::default()
        },
    )
}

/// Never more than allowed, never less than before, and each time noticeably harder for some vCPU.
fn throttled_well(end: &End, most: u8) -> Result<(), TestCaseError> {
    let mut before = vec![0; end.throttles.first().map_or(0, Vec::len)];
    for percent in &end.throttles {
        prop_assert!(percent.iter().all(|&percent| percent <= most), "{end:?}");
        prop_assert!(percent.iter().zip(&before).all(|(now, before)| now >= before), "it swings: {end:?}");
        let harder =
            |(&now, &before): (&u8, &u8)| now > before && (now == most || running(now) <= running(before) * 0.8);
        prop_assert!(percent.iter().zip(&before).any(harder), "{end:?}");
        before.clone_from(percent);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_migration_ends_within_its_limits(guest in guests(), limits in limits()) {
        let end = simulate(&guest, &limits);
        prop_assert!(end.rounds <= limits.max_rounds);
        // Time is looked at after each round.
        prop_assert!(end.time <= limits.timeout + end.last_round, "{end:?}");
        throttled_well(&end, limits.throttle_max_percent)?;
        match &end.decision {
            Decision::Switchover => {
                let block = Duration::from_secs_f64(2.0 * BLOCK_BYTES as f64 / MIB / guest.link_mib_s);
                prop_assert!(end.downtime <= limits.downtime + block, "{end:?}");
            }
            Decision::ForceSwitchover => prop_assert!(limits.force_switchover),
            Decision::Postcopy => prop_assert!(limits.mode == MigrationMode::Hybrid && !limits.force_switchover),
            Decision::GiveUp { reason } => {
                prop_assert!(limits.mode == MigrationMode::Precopy && !limits.force_switchover);
                prop_assert!(reason.contains("throttling"), "{reason}");
            }
            other => prop_assert!(false, "{other:?} ends nothing"),
        }
    }

    /// With leave to hold vCPUs as long as it takes, a guest that writes steadily always gets away by pre-copy.
    #[test]
    fn throttling_moves_every_steady_guest(
        mut guest in guests(),
        downtime_ms in 60u64..500,
    ) {
        guest.vcpus.iter_mut().for_each(|vcpu| vcpu.burst = 1.0);
        (guest.disk_mib, guest.disk_mib_s) = (0.0, 0.0);
        let limits = Limits {
            downtime: Duration::from_millis(downtime_ms),
            max_rounds: 100,
            timeout: Duration::from_secs(100_000),
            throttle_max_percent: 99,
            mode: MigrationMode::Precopy,
            ..Limits::default()
        };
        let end = simulate(&guest, &limits);
        prop_assert_eq!(&end.decision, &Decision::Switchover, "{:?}", &end);
        prop_assert!(end.rounds <= 40, "{end:?}");
        throttled_well(&end, 99)?;
    }

    /// Of two vCPUs, one of which dirties next to nothing, only the other is held, where the host can tell.
    #[test]
    fn the_quiet_vcpu_of_two_is_left_alone(rate in 1.1..3.0f64, quiet in 0.0..0.1f64) {
        let vcpu = |rate: f64| Vcpu {
            working_set_mib: 500.0, mib_s: 1000.0 * rate, hot_mib: 0.0, hot_mib_s: 0.0, burst: 1.0, burst_s: 1.0,
        };
        let guest = Guest {
            memory_mib: 2000.0,
            vcpus: vec![vcpu(quiet), vcpu(rate)],
            disk_mib: 0.0,
            disk_mib_s: 0.0,
            link_mib_s: 1000.0,
            round_trip: Duration::from_micros(200),
            tells: true,
        };
        let limits = Limits { mode: MigrationMode::Precopy, throttle_max_percent: 99, ..Limits::default() };
        let end = simulate(&guest, &limits);
        prop_assert_eq!(&end.decision, &Decision::Switchover, "{:?}", &end);
        prop_assert_eq!(end.throttles.len(), 1, "one change is enough where the rates are known: {:?}", &end);
        prop_assert!(end.throttles[0][0] == 0 && (50..=90).contains(&end.throttles[0][1]), "{end:?}");
    }
}
