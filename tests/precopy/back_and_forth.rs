//! A to B to A to B: every arrival is also the next departure.

use hostd::api::types::{MachineStatus, MigrationStage};
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

/// The next move is ordered as soon as the other host says that the machine runs there, while both hosts still have
/// things to do for the one before: the destination verifies, the source asks the probes and clears away.
#[test]
fn a_move_back_does_not_wait_for_the_end_of_the_one_before() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    let mut started: Vec<(&str, String)> = Vec::new();
    let mut overlapping = 0;
    for number in 0..6 {
        let (from, to) = if number % 2 == 0 { ("a1", "b1") } else { ("b1", "a1") };
        if let Some((host, id)) = started.last().cloned() {
            let before = world.ask(host, async |client| client.migration(&id).await).expect("the one before");
            overlapping += usize::from(!before.stage.ended());
        }
        let migration = world.start_migration("vm1", from, to, None);
        let migration = migration.unwrap_or_else(|error| panic!("move {number}: {error}\n{}", world.logs()));
        started.push((from, migration.id));
        world.wait("the machine to run at the other host", || {
            let machine = world.ask(to, async |client| client.machine("vm1").await).ok()?;
            (machine.status == MachineStatus::Running).then_some(())
        });
    }
    for (number, (host, id)) in started.into_iter().enumerate() {
        let ended = world.wait_migration(host, &id);
        assert_eq!(ended.stage, MigrationStage::Completed, "move {number}: {:?}\n{}", ended.error, world.logs());
        assert_eq!(ended.error, None, "move {number}");
    }
    println!("{overlapping} of 5 moves were ordered before the end of the one before");
    assert!(overlapping > 0, "none was early: this test has shown nothing");
    assert_eq!((world.machines_on("a1"), world.machines_on("b1")), (vec!["vm1".to_owned()], Vec::new()));
    world.check_oracles(&spec);
    world.finish();
}
