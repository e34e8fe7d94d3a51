//! The switchover is held back by the operator, and limits change while it runs.

use std::time::{Duration, Instant};

use migration::control::{Control, Phase};
use migration::guest::BLOCK_BYTES;
use migration::policy::MigrationMode;
use migration::report::Outcome;
use migration::testing::{Owner, Pair, Workload, machines, settle};

const PATIENCE: Duration = Duration::from_secs(20);

fn workload() -> Workload {
    Workload {
        filled_pages: 300,
        sweep_pages: 200,
        pages_per_ms: 5,
        sweep_blocks: 6,
        blocks_per_16_pages: 1,
        ..Workload::default()
    }
}

fn wait(what: &str, control: &Control, wanted: impl Fn(&Control) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !wanted(control) {
        assert!(Instant::now() < deadline, "no {what}: {:?}", control.status());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Several rounds after it was ready, and beyond its time limit: time in which it is held counts for nothing.
#[test]
fn a_held_migration_waits_with_its_guest_running_and_goes_on_when_told() {
    for mode in [MigrationMode::Precopy, MigrationMode::Postcopy] {
        let (world, source, destination) = machines(1024, &[12 * BLOCK_BYTES]);
        source.boot(workload());
        destination.offers_postcopy.store(true, std::sync::atomic::Ordering::SeqCst);
        let mut pair = Pair::new();
        pair.source_options.limits.mode = mode;
        pair.source_options.limits.timeout = Duration::from_secs(2);
        let control = pair.source_control.clone();
        control.hold();
        let steering = std::thread::spawn(move || {
            wait("readiness", &control, |control| control.status().waiting);
            let before = control.status();
            wait("further rounds", &control, |control| control.status().round >= before.round + 3);
            let status = control.status();
            assert_eq!((status.phase, status.waiting, status.committed), (Phase::Precopy, true, false));
            assert_eq!(status.expected_remaining, None, "nobody knows when the operator releases it");
            control.release();
        });
        let (report, received) = pair.run(&source, &destination);
        steering.join().expect("the steering thread");
        let owner = settle(&world, &source, &destination, &report, &received).expect("one owner");
        assert_eq!((report.outcome, owner), (Outcome::Completed, Owner::Destination), "{mode:?}: {}", report.reason);
        assert!(report.total_ms > 2500.0, "{mode:?}: held beyond its limit: {} ms", report.total_ms);
    }
}

#[test]
fn a_held_migration_can_be_cancelled() {
    let (world, source, destination) = machines(1024, &[12 * BLOCK_BYTES]);
    source.boot(workload());
    let pair = Pair::new();
    let control = pair.source_control.clone();
    control.hold();
    let steering = std::thread::spawn(move || {
        wait("readiness", &control, |control| control.status().waiting);
        control.cancel().expect("before Commit");
    });
    let (report, received) = pair.run(&source, &destination);
    steering.join().expect("the steering thread");
    let owner = settle(&world, &source, &destination, &report, &received).expect("one owner");
    assert_eq!((report.outcome, owner), (Outcome::Cancelled, Owner::Source), "{}", report.reason);
    assert!(!report.transient, "what an operator ended is not tried again");
}

/// A guest too busy for its downtime limit goes on in rounds until the limit is raised.
#[test]
fn a_longer_downtime_allowed_on_the_way_ends_the_rounds() {
    let (world, source, destination) = machines(4096, &[]);
    source.boot(Workload { filled_pages: 2000, sweep_pages: 2000, pages_per_ms: 10, ..workload() });
    let mut pair = Pair::new();
    pair.source_options.limits.mode = MigrationMode::Precopy;
    pair.source_options.limits.downtime = Duration::from_millis(1);
    pair.source_options.limits.bandwidth_bytes_per_second = Some(20 << 20);
    let control = pair.source_control.clone();
    let steering = std::thread::spawn(move || {
        wait("the second round", &control, |control| control.status().round >= 1);
        control.set_downtime(Duration::from_secs(5));
    });
    let (report, received) = pair.run(&source, &destination);
    steering.join().expect("the steering thread");
    let owner = settle(&world, &source, &destination, &report, &received).expect("one owner");
    assert_eq!((report.outcome, owner), (Outcome::Completed, Owner::Destination), "{}", report.reason);
}
