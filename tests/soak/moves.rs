//! A to B to A to B ... with load on disk and network.

use std::time::Instant;

use hostd::lab::LabHost;
use tests::world::{Spec, World};
use tests::{Need, ready};

use crate::leaks::Held;

/// In the ordinary run; `make soak` sets `HEADROOM_SOAK_MOVES`.
const MOVES: usize = 10;
/// Moves before the first look: both hosts have been source and destination by then, and have made what they keep.
const WARM: usize = 4;

/// Moves between two lines about the memory of the daemons.
const LOOK: usize = 50;

fn held(world: &World) -> [Held; 2] {
    ["a1", "b1"].map(|host| Held::by(world.host(host)))
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

#[test]
fn nothing_is_lost_and_nothing_grows() {
    if !ready(Need::Kvm) {
        return;
    }
    let moves = std::env::var("HEADROOM_SOAK_MOVES").map_or(MOVES, |text| text.parse().expect("a number of moves"));
    let moves = moves.max(WARM + 2).next_multiple_of(2);
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    world.check_oracles(&spec);
    let observer = world.observe(&[&spec], 200, 50);
    let (start, mut before) = (Instant::now(), None);
    let (mut totals, mut downtimes) = (Vec::new(), Vec::new());
    for number in 0..moves {
        if number == WARM {
            before = Some(held(&world));
        }
        let (from, to) = if number % 2 == 0 { ("a1", "b1") } else { ("b1", "a1") };
        let report = world.moves(&spec, from, to, None);
        let equal = (report.verification.memory_digest_ok, report.verification.disk_digest_ok);
        assert_eq!(equal, (Some(true), Some(true)), "move {number}: {:?}", report.verification);
        let status = world.status(&spec);
        totals.push(report.total_ms);
        downtimes.push(report.downtime_ms.total);
        println!(
            "move {}/{moves}: {:.0} ms, down {:.1} ms; {} pages and {} blocks read back; {} s",
            number + 1,
            report.total_ms,
            report.downtime_ms.total,
            status.sweep_pages_checked,
            status.disk_blocks_checked,
            start.elapsed().as_secs()
        );
        if (number + 1) % LOOK == 0 {
            let resident = held(&world).map(|held| held.resident_kib);
            println!("resident memory of the daemons after {} moves: {resident:?} KiB", number + 1);
        }
    }
    let (before, after) = (before.expect("a look after the first moves"), held(&world));
    println!(
        "{moves} moves in {} s; total {:.0} ms, downtime {:.1} ms (medians), at most {:.1} ms",
        start.elapsed().as_secs(),
        median(&totals),
        median(&downtimes),
        downtimes.iter().copied().fold(0.0, f64::max)
    );
    println!("before {before:#?}\nafter {after:#?}");
    for ((host, before), after) in ["a1", "b1"].iter().zip(&before).zip(&after) {
        let grown = after.grown(before);
        assert!(grown.is_empty(), "{host} holds more after {moves} moves: {grown:?}");
    }
    let tcp = observer.tcp("vm1").unwrap();
    assert!(tcp.alive() && tcp.bytes_echoed > 1000, "one TCP connection through {moves} moves: {tcp:?}");
    drop(observer);
    no_vmm_is_left(world.host("b1"));
    world.finish();
}

/// The machine is at `a1`: on the other host there is neither its folder nor its process.
fn no_vmm_is_left(host: &LabHost) {
    let left = std::fs::read_dir(host.directory().join("run/machines")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "folders of machines are left on {}", host.name());
}
