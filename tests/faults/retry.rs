//! Attempts after the first one.

use hostd::api::types::{MigrateRequest, Migration, MigrationLimits, MigrationStage, Phase};
use hostd::lab::binary;
use tests::world::{Spec, World};
use tests::{Need, ready};

fn request(world: &World, retries: u32, bandwidth: Option<u64>) -> Migration {
    let limits = MigrationLimits { bandwidth_bytes_per_second: bandwidth, ..MigrationLimits::default() };
    let request = MigrateRequest {
        destination: "b1".into(),
        limits: Some(limits),
        retries: Some(retries),
        ..MigrateRequest::default()
    };
    world.ask("a1", async |client| client.migrate("vm1", &request).await).expect("a migration that starts")
}

fn at_stage(world: &World, id: &str, stage: MigrationStage) -> Migration {
    world.wait("the stage", || {
        let migration = world.ask("a1", async |client| client.migration(id).await).ok()?;
        (migration.stage == stage).then_some(migration)
    })
}

fn booted() -> (World, Spec) {
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    (world, spec)
}

#[test]
fn a_destination_that_comes_back_gets_the_machine() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec) = booted();
    world.host("b1").kill_daemon();
    let started = request(&world, 5, None);
    let waiting = at_stage(&world, &started.id, MigrationStage::Retrying);
    assert!(waiting.failures.len() == 1 && waiting.retry_at_unix_ms.is_some(), "{waiting:?}");
    assert!(waiting.failures[0].error.contains("cannot reach host `b1`"), "{waiting:?}");
    assert_eq!((waiting.attempt, waiting.retries_left), (2, 4));
    // The daemon that waits is replaced as well: what was asked for is stored.
    world.host("a1").kill_daemon();
    for host in ["a1", "b1"] {
        world.host(host).spawn_daemon(&binary("hostd").unwrap()).unwrap();
        world.host(host).wait_ready().unwrap();
    }
    let ended = world.wait_migration("a1", &started.id);
    assert_eq!(ended.stage, MigrationStage::Completed, "{ended:?}\n{}", world.logs());
    assert!(ended.attempt >= 2 && !ended.failures.is_empty(), "{ended:?}");
    let audit = world.ask("a1", async |client| client.audit(100).await).unwrap();
    assert!(audit.iter().any(|record| record.action == "migration-retry"), "{audit:#?}");
    assert_eq!(world.machines_on("b1"), ["vm1"]);
    world.check_oracles(&spec);
    world.finish();
}

#[test]
fn a_cut_cable_is_survived_by_another_attempt() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec) = booted();
    let started = request(&world, 8, Some(16_000_000));
    world.wait("pre-copy", || {
        let migration = world.ask("a1", async |client| client.migration(&started.id).await).ok()?;
        let progress = migration.progress.as_ref()?;
        (progress.phase == Phase::Precopy && progress.bytes_done > 1 << 20).then_some(())
    });
    world.lab.fabric().set_link("b1", false).unwrap();
    at_stage(&world, &started.id, MigrationStage::Retrying);
    world.check_oracles(&spec);
    world.lab.fabric().set_link("b1", true).unwrap();
    let ended = world.wait_migration("a1", &started.id);
    assert_eq!(ended.stage, MigrationStage::Completed, "{ended:?}\n{}", world.logs());
    assert_eq!(ended.report.expect("a report").verification.memory_digest_ok, Some(true));
    assert_eq!((world.machines_on("a1"), world.machines_on("b1")), (vec![], vec!["vm1".to_owned()]));
    world.check_oracles(&spec);
    world.finish();
}

#[test]
fn a_cancel_ends_the_waiting_and_a_refusal_is_final() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec) = booted();
    world.host("b1").kill_daemon();
    let started = request(&world, 20, None);
    at_stage(&world, &started.id, MigrationStage::Retrying);
    world.ask("a1", async |client| client.cancel_migration(&started.id).await).expect("a cancel that is accepted");
    let ended = world.wait_migration("a1", &started.id);
    assert_eq!(ended.stage, MigrationStage::Cancelled, "{ended:?}");
    world.host("b1").spawn_daemon(&binary("hostd").unwrap()).unwrap();
    world.host("b1").wait_ready().unwrap();
    // A host that is closed stays closed however often it is asked.
    world.ask("b1", async |client| client.start_drain(&Default::default()).await).unwrap();
    let started = request(&world, 20, None);
    let ended = world.wait_migration("a1", &started.id);
    assert_eq!((ended.stage, ended.failures.len()), (MigrationStage::Failed, 0), "{ended:?}");
    assert!(ended.error.as_ref().is_some_and(|error| error.contains("being drained")), "{ended:?}");
    world.check_oracles(&spec);
    world.finish();
}
