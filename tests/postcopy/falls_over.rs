//! A guest that writes far faster than the link carries.

use migration::policy::MigrationMode;
use migration::report::Mode;
use tests::world::{World, last_echoes};
use tests::{Need, ready};

use super::{limits, storm};

#[test]
fn a_storm_of_writes_moves_and_answers_all_the_way() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = storm("vm1");
    world.boot("a1", &spec);
    let observer = world.observe(&[&spec], 200, 50);
    let start = observer.now();
    // What the guest writes shrinks to a fiftieth on the way: it is faster than this link all the same.
    let report = world.moves(&spec, "a1", "b1", limits(MigrationMode::Hybrid, 4));
    println!("{}", serde_json::to_string_pretty(&report).unwrap());
    assert_eq!(report.mode, Mode::Hybrid);
    let postcopy = report.postcopy.as_ref().expect("what post-copy did");
    assert!(postcopy.faults > 0 && postcopy.fault_us_p50 > 0.0 && postcopy.recoveries == 0, "{postcopy:?}");
    let verification = &report.verification;
    assert_eq!((verification.memory_digest_ok, verification.disk_digest_ok), (Some(true), Some(true)));
    let udp = last_echoes(&observer, "vm1", start);
    println!("network gap {:.1} ms, downtime {:.1} ms, {udp:?}", udp.gap_ms, report.downtime_ms.total);
    // Stopped for all that is dirty it would have been silent for a second.
    assert!(udp.answered > 100 && udp.gap_ms < 800.0, "{udp:?}");
    drop(observer);
    world.finish();
}
