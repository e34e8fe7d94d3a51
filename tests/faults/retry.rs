//! Attempts after the first one.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

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

/// Where old data of the guest's are on its disk: behind what it works on.
const OLD: Range<u64> = 32 << 20..160 << 20;

fn image(world: &World, host: &str) -> File {
    let path = world.host(host).directory().join("state").join("machines/vm1/disk0.raw");
    File::options().read(true).write(true).open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Data that cannot be compressed.
fn old_data() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words = std::iter::repeat_with(word).take(((OLD.end - OLD.start) / 8) as usize);
    words.flat_map(u64::to_le_bytes).collect()
}

/// What had arrived of the disk before the cut is not sent again.
#[test]
fn a_cut_cable_is_survived_by_another_attempt() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec { disk_mib: 256, ..Spec::busy("vm1", 0) };
    world.boot("a1", &spec);
    let old = old_data();
    image(&world, "a1").write_all_at(&old, OLD.start).and_then(|()| image(&world, "a1").sync_all()).unwrap();
    let started = request(&world, 8, Some(48_000_000));
    world.wait("pre-copy", || {
        let migration = world.ask("a1", async |client| client.migration(&started.id).await).ok()?;
        let progress = migration.progress.as_ref()?;
        (progress.phase == Phase::Precopy && progress.bytes_done > 96 << 20).then_some(())
    });
    world.lab.fabric().set_link("b1", false).unwrap();
    at_stage(&world, &started.id, MigrationStage::Retrying);
    world.check_oracles(&spec);
    world.lab.fabric().set_link("b1", true).unwrap();
    let ended = world.wait_migration("a1", &started.id);
    assert_eq!(ended.stage, MigrationStage::Completed, "{ended:?}\n{}", world.logs());
    let report = ended.report.expect("a report");
    assert_eq!(report.verification.memory_digest_ok, Some(true));
    assert_eq!(report.verification.disk_digest_ok, Some(true));
    assert!(report.disk.bytes_reused > 8 << 20, "{:?}", report.disk);
    let data = OLD.end - OLD.start + (u64::from(spec.workload.disk_mib) << 20);
    assert!(report.disk.bytes_sent < data - report.disk.bytes_reused / 2, "{:?}", report.disk);
    assert_eq!((world.machines_on("a1"), world.machines_on("b1")), (vec![], vec!["vm1".to_owned()]));
    let mut arrived = vec![0; old.len()];
    image(&world, "b1").read_exact_at(&mut arrived, OLD.start).unwrap();
    assert!(arrived == old, "old data has changed on its way");
    assert!(!world.host("b1").directory().join("state").join("partial/vm1").exists());
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
