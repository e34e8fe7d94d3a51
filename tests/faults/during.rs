//! Failures while memory and disk are on their way.

use hostd::api::types::{Migration, MigrationLimits, MigrationStage, Phase};
use hostd::lab::binary;
use tests::world::{Spec, World};
use tests::{Need, ready};

/// Slow enough that every phase of pre-copy can be caught: about a second for each 16 MB.
fn slow() -> Option<MigrationLimits> {
    Some(MigrationLimits { bandwidth_bytes_per_second: Some(16_000_000), timeout_s: 30, ..MigrationLimits::default() })
}

/// A busy machine on `a1`, and a migration of it to `b1` that has sent something.
fn under_way() -> (World, Spec, Migration) {
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    world.check_oracles(&spec);
    let migration = start(&world, &spec);
    (world, spec, migration)
}

fn start(world: &World, spec: &Spec) -> Migration {
    let started = world.start_migration(&spec.name, "a1", "b1", slow()).expect("a migration that starts");
    world.wait("pre-copy", || {
        let migration = world.ask("a1", async |client| client.migration(&started.id).await).ok()?;
        let progress = migration.progress.as_ref()?;
        assert!(!migration.stage.ended(), "it ended before it could be disturbed: {migration:?}");
        (progress.phase == Phase::Precopy && progress.bytes_done > 1 << 20).then_some(migration)
    })
}

/// It ended without success, the machine goes on at the source as if nothing had been, and a new attempt works.
fn stays_then_moves(world: World, spec: &Spec, migration: &Migration, expected: MigrationStage) {
    let ended = world.wait_migration("a1", &migration.id);
    assert_eq!(ended.stage, expected, "{ended:?}");
    if expected == MigrationStage::Failed {
        assert!(ended.error.as_ref().is_some_and(|error| error.len() > 10), "{ended:?}");
    }
    assert_eq!(world.machines_on("a1"), ["vm1"]);
    world.check_oracles(spec);
    let again = world.wait("a retry that works", || {
        let started = world.start_migration("vm1", "a1", "b1", None).ok()?;
        let ended = world.wait_migration("a1", &started.id);
        (ended.stage == MigrationStage::Completed).then_some(ended)
    });
    let verification = again.report.expect("a report").verification;
    assert_eq!((verification.memory_digest_ok, verification.disk_digest_ok), (Some(true), Some(true)));
    assert_eq!(world.machines_on("b1"), ["vm1"]);
    world.check_oracles(spec);
    world.finish();
}

#[test]
fn a_killed_destination_vmm_leaves_the_machine_at_its_source() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec, migration) = under_way();
    let pid = world.wait("the destination's VMM", || {
        let machine = world.ask("b1", async |client| client.machine("vm1").await).ok()?;
        machine.pid
    });
    crate::kill(pid);
    stays_then_moves(world, &spec, &migration, MigrationStage::Failed);
}

#[test]
fn a_killed_destination_daemon_leaves_the_machine_running_somewhere_exactly_once() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec, migration) = under_way();
    world.host("b1").kill_daemon();
    world.host("b1").spawn_daemon(&binary("hostd").unwrap()).unwrap();
    world.host("b1").wait_ready().unwrap();
    let ended = world.wait_migration("a1", &migration.id);
    let there = ended.stage == MigrationStage::Completed;
    let (at_source, at_destination) = world.wait("one owner", || {
        let (source, destination) = (world.machines_on("a1").len(), world.machines_on("b1").len());
        (source + destination == 1).then_some((source, destination))
    });
    assert_eq!((at_source, at_destination), if there { (0, 1) } else { (1, 0) }, "{ended:?}");
    world.check_oracles(&spec);
    world.finish();
}

#[test]
fn a_cut_cable_leaves_the_machine_at_its_source() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec, migration) = under_way();
    world.lab.fabric().set_link("b1", false).unwrap();
    let ended = world.wait_migration("a1", &migration.id);
    assert_eq!(ended.stage, MigrationStage::Failed, "{ended:?}");
    // The guest was never cut off: it is at a1, whose cable was not touched.
    world.check_oracles(&spec);
    world.lab.fabric().set_link("b1", true).unwrap();
    stays_then_moves(world, &spec, &migration, MigrationStage::Failed);
}

#[test]
fn a_cancelled_migration_leaves_the_machine_at_its_source() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec, migration) = under_way();
    world.ask("a1", async |client| client.cancel_migration(&migration.id).await).expect("a cancel that is accepted");
    stays_then_moves(world, &spec, &migration, MigrationStage::Cancelled);
}

#[test]
fn a_killed_source_daemon_finds_its_machine_again() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    world.host("a1").kill_daemon();
    // The machine is a process of its own and does not notice.
    world.check_oracles(&spec);
    world.host("a1").spawn_daemon(&binary("hostd").unwrap()).unwrap();
    world.host("a1").wait_ready().unwrap();
    assert_eq!(world.machines_on("a1"), ["vm1"]);
    let migration = world.wait("a move", || {
        let started = world.start_migration("vm1", "a1", "b1", None).ok()?;
        let ended = world.wait_migration("a1", &started.id);
        (ended.stage == MigrationStage::Completed).then_some(ended)
    });
    assert_eq!(migration.machine, "vm1");
    world.check_oracles(&spec);
    world.finish();
}
