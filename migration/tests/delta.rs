//! Pages that are sent again travel as what differs, where the link is slow; what arrives is the same.

use std::time::Duration;

use migration::policy::{Limits, MigrationMode};
use migration::report::{Outcome, Report};
use migration::testing::{Owner, Pair, Workload, machines, settle};

/// Sweeps 400 pages that no compression makes smaller, at 41 MB/s.
fn busy() -> Workload {
    Workload { filled_pages: 5000, sweep_pages: 400, pages_per_ms: 10, small_writes: true, ..Workload::default() }
}

fn moved(workload: &Workload, limits: Limits) -> Report {
    let (world, source, destination) = machines(8192, &[]);
    source.boot(workload.clone());
    let mut pair = Pair::new();
    pair.source_options.limits = limits;
    let (report, received) = pair.run(&source, &destination);
    // The oracle reads every page: a difference that was applied to another page, or twice, is found.
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination), "{}", report.reason);
    report
}

fn slow() -> Limits {
    // Slower than the guest writes: only differences can keep up.
    Limits {
        bandwidth_bytes_per_second: Some(30 << 20),
        downtime: Duration::from_millis(30),
        mode: MigrationMode::Precopy,
        compare_full: true,
        ..Limits::default()
    }
}

/// The guest dirties more than the link carries, and pre-copy converges all the same.
#[test]
fn a_guest_that_writes_little_in_each_page_converges_over_a_slow_link() {
    for streams in [1, 3] {
        let report = moved(&busy(), Limits { streams, ..slow() });
        assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
        // Round 1 sends what round 0 has seen, and keeps copies; from then on a page is a few bytes.
        let round = &report.rounds[2];
        assert!(round.bytes < round.pages * 1024, "{:?}", report.rounds);
        assert!(report.memory.pages_delta >= (round.pages - round.zero_pages) / 2, "{:?}", report.memory);
    }
}

/// Nothing is gained where pages change as a whole, and nothing is broken.
#[test]
fn pages_that_change_as_a_whole_arrive_as_well() {
    let workload = Workload { small_writes: false, pages_per_ms: 1, ..busy() };
    assert_eq!(moved(&workload, slow()).outcome, Outcome::Completed);
}
