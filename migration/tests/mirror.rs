//! Writes of the guest are mirrored where rounds would never catch up with them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use migration::guest::{BLOCK_BYTES, GuestError};
use migration::policy::{Limits, MigrationMode};
use migration::report::Outcome;
use migration::testing::{FakeMachine, Owner, Pair, Workload, World, machines, settle};

const BLOCKS: u64 = 64;

/// Rewrites its disk of 4 MiB at up to 131 MB/s.
fn busy() -> Workload {
    Workload {
        filled_pages: 100,
        sweep_pages: 20,
        pages_per_ms: 32,
        sweep_blocks: BLOCKS,
        blocks_per_16_pages: 1,
        ..Workload::default()
    }
}

/// Over a link of 16 MiB/s: rounds alone end with all of the disk left, more than 100 ms even where it packs.
fn limits() -> Limits {
    Limits {
        bandwidth_bytes_per_second: Some(16 << 20),
        downtime: Duration::from_millis(50),
        mode: MigrationMode::Precopy,
        compare_full: true,
        ..Limits::default()
    }
}

fn guests() -> (Arc<World>, Arc<FakeMachine>, Arc<FakeMachine>) {
    let (world, source, destination) = machines(1024, &[BLOCKS * BLOCK_BYTES]);
    source.boot(busy());
    (world, source, destination)
}

#[test]
fn a_disk_that_is_written_faster_than_the_link_arrives() {
    let (world, source, destination) = guests();
    let mut pair = Pair::new();
    pair.source_options.limits = limits();
    let (report, received) = pair.run(&source, &destination);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination), "{}", report.reason);
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    assert!(report.disk.mirrored > 0, "{:?}", report.disk);
    assert!(!source.disks[0].gate.is_shut());
}

#[test]
fn where_writes_cannot_be_mirrored_it_gives_up_and_the_guest_goes_on() {
    let (world, source, destination) = guests();
    source.disks[0].refuses_mirroring.store(true, Ordering::SeqCst);
    let mut pair = Pair::new();
    pair.source_options.limits = limits();
    let (report, received) = pair.run(&source, &destination);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source));
    assert!(report.reason.contains("does not converge"), "{}", report.reason);
    assert_eq!(report.disk.mirrored, 0);
}

/// Whatever ends a migration, no write of the guest waits afterwards.
#[test]
fn writes_are_answered_again_after_a_failure() {
    for call in ["disk.start_mirroring", "pause", "collect_dirty", "disk.collect_dirty"] {
        let (world, source, destination) = guests();
        let (mirrors, disk) = (Arc::new(AtomicBool::new(false)), Arc::clone(&source.disks[0]));
        let seen = Arc::clone(&mirrors);
        let starts = call == "disk.start_mirroring";
        source.faults.on(call, move |_| {
            seen.fetch_or(disk.gate.is_shut(), Ordering::SeqCst);
            if starts || seen.load(Ordering::SeqCst) { Err(GuestError::new("out of order")) } else { Ok(()) }
        });
        let mut pair = Pair::new();
        pair.source_options.limits = limits();
        let (report, received) = pair.run(&source, &destination);
        assert_eq!(report.outcome, Outcome::Failed, "{call}: {}", report.reason);
        assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source), "{call}");
        assert!(starts || mirrors.load(Ordering::SeqCst), "{call}: nothing was mirrored by then");
        assert!(!source.disks[0].gate.is_shut() && source.disks[0].is_answered(), "{call}");
    }
}
