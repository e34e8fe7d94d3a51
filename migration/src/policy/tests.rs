//! The policy over simulated guests.

use proptest::prelude::*;

use super::*;
use crate::guest::{BLOCK_BYTES, PAGE_BYTES};

const MIB: f64 = 1024.0 * 1024.0;

/// A guest that dirties pages of a working set and blocks of a disk at fixed rates, and a link of fixed bandwidth.
#[derive(Clone, Debug)]
struct Simulated {
    memory_mib: f64,
    working_set_mib: f64,
    dirty_mib_s: f64,
    disk_mib: f64,
    disk_dirty_mib_s: f64,
    link_mib_s: f64,
    round_trip: Duration,
    /// A flush of the destination's disk.
    flush: Duration,
    /// Whether its writes can be mirrored, and what it writes without waiting for an answer.
    mirrors: bool,
    in_flight_mib: f64,
}

/// Pre-copy alone: what follows if it does not converge is tested apart.
fn precopy() -> Limits {
    Limits { mode: MigrationMode::Precopy, ..Limits::default() }
}

#[derive(Debug)]
struct End {
    decision: Decision,
    rounds: u32,
    real_downtime: Duration,
    estimate: Duration,
}

fn simulate(guest: &Simulated, limits: &Limits) -> End {
    let (mut memory, mut disk) = (guest.memory_mib, guest.disk_mib);
    let mut history = History::default();
    let mut mirrors = guest.mirrors.then_some(false);
    let mut total = Duration::ZERO;
    for round in 0.. {
        let memory_time = Duration::from_secs_f64(memory / guest.link_mib_s);
        let disk_time = Duration::from_secs_f64(disk / guest.link_mib_s);
        let elapsed = memory_time + disk_time + guest.round_trip;
        total += elapsed;
        history.sent(((memory * MIB) as u64, memory_time), ((disk * MIB) as u64, disk_time));
        history.settled((disk * MIB) as u64, guest.flush);
        memory = (elapsed.as_secs_f64() * guest.dirty_mib_s).min(guest.working_set_mib);
        let unanswered = if mirrors == Some(true) { guest.in_flight_mib } else { f64::MAX };
        disk = (elapsed.as_secs_f64() * guest.disk_dirty_mib_s).min(guest.disk_mib).min(unanswered);
        let mut stats = RoundStats {
            round,
            elapsed,
            total_elapsed: total,
            dirty_pages: (memory * MIB / PAGE_BYTES as f64) as u64,
            dirty_blocks: (disk * MIB / BLOCK_BYTES as f64) as u64,
            memory_bytes_per_second: history.memory_bytes_per_second(),
            disk_bytes_per_second: history.disk_bytes_per_second(),
            disk_settle: history.disk_settle(),
            round_trip: guest.round_trip,
            ..RoundStats::default()
        };
        stats.rounds_without_progress = history.remained(stats.remaining_bytes());
        stats.mirrors_writes = mirrors;
        let decision = converge(&stats, limits);
        if decision == Decision::MirrorWrites {
            assert_eq!(mirrors.replace(true), Some(false));
            history.forget_progress();
            continue;
        }
        if decision != Decision::Continue {
            let real = Duration::from_secs_f64((memory + disk) / guest.link_mib_s)
                + guest.round_trip * 2
                + FIXED_COST
                + if disk * MIB >= BLOCK_BYTES as f64 { guest.flush } else { Duration::ZERO };
            return End { decision, rounds: round + 1, real_downtime: real, estimate: stats.estimated_downtime() };
        }
        assert!(round < limits.max_rounds, "went on past the last round");
    }
    unreachable!()
}

fn guests() -> impl Strategy<Value = Simulated> {
    (64.0..4096.0f64, 0.0..1.0f64, 0.0..3.0f64, 0.0..4096.0f64, 0.0..3.0f64, 10.0..3000.0f64, 0u64..50_000, 0u64..100)
        .prop_map(|(memory_mib, share, dirty, disk_mib, disk_dirty, link_mib_s, round_trip, flush)| Simulated {
            memory_mib,
            working_set_mib: memory_mib * share,
            dirty_mib_s: link_mib_s * dirty,
            disk_mib,
            disk_dirty_mib_s: link_mib_s * disk_dirty,
            link_mib_s,
            round_trip: Duration::from_micros(round_trip),
            flush: Duration::from_millis(flush),
            mirrors: flush % 2 == 0,
            in_flight_mib: 4.0,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// It always ends, and where it ends by a switchover the downtime is within the limit (the simulated link keeps the
    /// bandwidth that was measured; blocks are counted in whole ones).
    #[test]
    fn ends_within_the_limit_or_gives_up(guest in guests(), downtime_ms in 5u64..2000, max_rounds in 1u32..40) {
        let limits = Limits { downtime: Duration::from_millis(downtime_ms), max_rounds, ..precopy() };
        let end = simulate(&guest, &limits);
        prop_assert!(end.rounds <= max_rounds);
        match end.decision {
            Decision::Switchover => {
                prop_assert!(end.estimate <= limits.downtime);
                let block = Duration::from_secs_f64(2.0 * BLOCK_BYTES as f64 / MIB / guest.link_mib_s);
                prop_assert!(end.real_downtime <= limits.downtime + block, "{end:?}");
            }
            Decision::GiveUp { reason } => {
                prop_assert!(end.estimate > limits.downtime);
                prop_assert!(reason.contains("MiB/s"));
            }
            other => prop_assert!(false, "{other:?} without the operator's leave"),
        }
    }

    /// With the operator's leave it never gives up.
    #[test]
    fn forced_always_switches(guest in guests(), downtime_ms in 5u64..500) {
        let limits = Limits { downtime: Duration::from_millis(downtime_ms), force_switchover: true, ..precopy() };
        prop_assert!(matches!(simulate(&guest, &limits).decision, Decision::Switchover | Decision::ForceSwitchover));
    }
}

fn busy(dirty_mib_s: f64) -> Simulated {
    Simulated {
        memory_mib: 512.0,
        working_set_mib: 400.0,
        dirty_mib_s,
        disk_mib: 0.0,
        disk_dirty_mib_s: 0.0,
        link_mib_s: 1500.0,
        round_trip: Duration::from_micros(100),
        flush: Duration::ZERO,
        mirrors: false,
        in_flight_mib: 1.0,
    }
}

#[test]
fn an_idle_guest_switches_after_the_first_round() {
    let end = simulate(&busy(0.0), &precopy());
    assert_eq!((end.decision, end.rounds), (Decision::Switchover, 1));
}

/// It does not stop at the first downtime that fits, but goes on while rounds still shorten it.
#[test]
fn goes_on_to_a_short_downtime() {
    let end = simulate(&busy(512.0), &Limits { downtime: Duration::from_millis(300), ..precopy() });
    assert_eq!(end.decision, Decision::Switchover);
    assert!(end.real_downtime < Duration::from_millis(7), "{end:?}");
}

#[test]
fn divergence_is_noticed_early() {
    let end = simulate(&busy(3000.0), &Limits { max_rounds: 1000, ..precopy() });
    assert!(matches!(end.decision, Decision::GiveUp { .. }));
    assert!(end.rounds <= 2 + STUCK_ROUNDS, "{end:?}");
}

#[test]
fn a_disk_that_does_not_converge_holds_the_switchover_back() {
    let guest = Simulated { disk_mib: 1000.0, disk_dirty_mib_s: 2000.0, ..busy(1.0) };
    assert!(matches!(simulate(&guest, &precopy()).decision, Decision::GiveUp { .. }));
    // ... unless its writes wait for the link.
    let end = simulate(&Simulated { mirrors: true, ..guest.clone() }, &precopy());
    assert_eq!(end.decision, Decision::Switchover);
    assert!(end.rounds <= 2 + HOLD_ROUNDS + STUCK_ROUNDS, "{end:?}");
    // Memory that does not converge is not helped by it.
    let both = Simulated { mirrors: true, dirty_mib_s: 3000.0, ..guest };
    assert!(matches!(simulate(&both, &precopy()).decision, Decision::GiveUp { .. }));
}

#[test]
fn writes_are_not_mirrored_where_that_would_not_help() {
    let stats = RoundStats {
        round: 5,
        elapsed: Duration::from_millis(100),
        dirty_blocks: 1000,
        disk_bytes_per_second: Some(5e8),
        rounds_without_progress: 2,
        mirrors_writes: Some(false),
        ..RoundStats::default()
    };
    assert_eq!(converge(&stats, &precopy()), Decision::MirrorWrites);
    let limits = Limits { mode: MigrationMode::Postcopy, ..Limits::default() };
    for (stats, limits) in [
        (RoundStats { mirrors_writes: None, ..stats.clone() }, precopy()),
        (RoundStats { mirrors_writes: Some(true), ..stats.clone() }, precopy()),
        (RoundStats { disk_settle: Duration::from_millis(90), ..stats.clone() }, precopy()),
        (RoundStats { dirty_blocks: 10, ..stats.clone() }, precopy()),
        (RoundStats { round: 0, ..stats.clone() }, precopy()),
        (stats, limits),
    ] {
        assert_ne!(converge(&stats, &limits), Decision::MirrorWrites, "{stats:?}");
    }
}

#[test]
fn a_guest_that_never_converges_goes_by_postcopy_where_that_is_allowed() {
    let guest = busy(3000.0);
    assert_eq!(simulate(&guest, &Limits::default()).decision, Decision::Postcopy);
    // The operator's explicit word for a long downtime comes first.
    let forced = Limits { force_switchover: true, ..Limits::default() };
    assert_eq!(simulate(&guest, &forced).decision, Decision::ForceSwitchover);
    // A guest that converges does not need it.
    assert_eq!(simulate(&busy(0.0), &Limits::default()).decision, Decision::Switchover);
}

#[test]
fn postcopy_alone_needs_one_round() {
    let limits = Limits { mode: MigrationMode::Postcopy, ..Limits::default() };
    let end = simulate(&busy(100.0), &limits);
    assert_eq!((end.decision, end.rounds), (Decision::Postcopy, 1));
}

#[test]
fn a_slow_flush_at_the_destination_is_part_of_the_downtime() {
    let stats = |blocks, settle| RoundStats {
        round: 3,
        elapsed: Duration::from_millis(20),
        total_elapsed: Duration::from_secs(1),
        dirty_pages: 0,
        dirty_blocks: blocks,
        memory_bytes_per_second: Some(1e9),
        disk_bytes_per_second: Some(1e9),
        disk_settle: Duration::from_millis(settle),
        round_trip: Duration::ZERO,
        rounds_without_progress: STUCK_ROUNDS,
        ..RoundStats::default()
    };
    let limits = precopy();
    assert_eq!(converge(&stats(1, 0), &limits), Decision::Switchover);
    assert!(
        matches!(converge(&stats(1, 60), &limits), Decision::GiveUp { .. }),
        "60 ms of flushing in 50 ms of downtime"
    );
    assert_eq!(converge(&stats(0, 60), &limits), Decision::Switchover, "nothing to flush");
}
