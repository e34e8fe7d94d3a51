//! A to B to A to B: every arrival is also the next departure.

use hostd::api::types::MigrationStage;
use tests::world::{Spec, World};
use tests::{Need, ready};

/// Migrations in a row.
const MOVES: usize = 20;

#[test]
fn twenty_moves_in_a_row_lose_nothing() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    world.check_oracles(&spec);
    let observer = world.observe(&[&spec], 100, 20);
    let mut uptime_ms = 0;
    for number in 0..MOVES {
        let (from, to) = if number % 2 == 0 { ("a1", "b1") } else { ("b1", "a1") };
        let migration = world.migrate("vm1", from, to, None);
        assert_eq!(
            migration.stage,
            MigrationStage::Completed,
            "move {number}: {:?}\n{}",
            migration.error,
            world.logs()
        );
        let report = migration.report.expect("a report at the source");
        let verification = &report.verification;
        let equal = (verification.memory_digest_ok, verification.disk_digest_ok);
        assert_eq!(equal, (Some(true), Some(true)), "move {number}: {verification:?}");
        let status = world.check_oracles(&spec);
        // The guest's clock goes on; it never jumps back.
        assert!(
            status.uptime_ms > uptime_ms,
            "move {number}: the guest's clock went from {uptime_ms} to {}",
            status.uptime_ms
        );
        uptime_ms = status.uptime_ms;
        println!("move {number}: {:.0} ms, down {:.1} ms", report.total_ms, report.downtime_ms.total);
    }
    let tcp = observer.tcp("vm1").unwrap();
    assert!(tcp.alive() && tcp.bytes_echoed > 1000, "one TCP connection through {MOVES} moves: {tcp:?}");
    drop(observer);
    world.finish();
}
