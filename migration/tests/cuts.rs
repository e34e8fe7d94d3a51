//! The link is cut at every TLS record of every connection in both directions, before it and in the middle of it.
//!
//! Frames begin records, so each frame boundary of the protocol is among them: before the layout, between two batches,
//! before and after a marker, its acknowledgement, State, Prepared, Commit, Resumed, digests and the goodbye.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use migration::guest::BLOCK_BYTES;
use migration::report::Outcome;
use migration::testing::{Authority, Cut, Owner, Pair, Proxy, Workload, machines, settle};

/// Three connections: control, memory 0, disk.
const CONNECTIONS: usize = 3;

/// One migration that is cut; `None` if it was over before.
fn cut_at(cut: Cut) -> Option<(Outcome, Owner)> {
    let (world, source, destination) = machines(512, &[10 * BLOCK_BYTES]);
    // It dirties a little all the time, so that the last round is not empty.
    source.boot(Workload {
        filled_pages: 150,
        sweep_pages: 64,
        pages_per_ms: 1,
        sweep_blocks: 4,
        blocks_per_16_pages: 1,
        ..Workload::default()
    });
    let mut pair = Pair::under(Authority::new());
    pair.destination_options.deadline = Duration::from_secs(3);
    let proxy = Proxy::start(pair.address(), Some(cut));
    pair.source_options.address = proxy.address();
    let start = Instant::now();
    let (report, received) = pair.run(&source, &destination);
    assert!(start.elapsed() < Duration::from_secs(10), "{cut:?} took {:?}", start.elapsed());
    if !proxy.was_cut() {
        assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
        return None;
    }
    let owner =
        settle(&world, &source, &destination, &report, &received).unwrap_or_else(|error| panic!("{cut:?}: {error}"));
    Some((report.outcome, owner))
}

#[test]
fn at_every_record() {
    let mut outcomes: BTreeMap<String, u32> = BTreeMap::new();
    let workers: Vec<_> = (0..CONNECTIONS)
        .flat_map(|connection| [true, false].map(|to_destination| (connection, to_destination)))
        .map(|(connection, to_destination)| {
            std::thread::spawn(move || {
                let mut seen = Vec::new();
                // The first cut that comes too late is past the end of this direction.
                for records in 0..200 {
                    let cut = Cut { connection, to_destination, records, half: records % 2 == 1 };
                    match cut_at(cut) {
                        Some(outcome) => seen.push(outcome),
                        None => return seen,
                    }
                }
                panic!("connection {connection} has no end");
            })
        })
        .collect();
    for worker in workers {
        let seen = worker.join().expect("every cut leaves one machine");
        assert!(seen.len() >= 3, "too few records in one direction: {seen:?}");
        for outcome in seen {
            *outcomes.entry(format!("{outcome:?}")).or_default() += 1;
        }
    }
    println!("{outcomes:#?}");
    // Cuts before Commit, around it and after it have all been met.
    for expected in ["(Failed, Source)", "(InDoubt, Destination)", "(Completed, Destination)", "(InDoubt, TakenBack)"] {
        assert!(outcomes.contains_key(expected), "no cut ended as {expected}: {outcomes:?}");
    }
}
