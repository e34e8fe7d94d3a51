//! Several migrations at once under one bandwidth budget.

use std::time::{Duration, Instant};

use hostd::api::types::{ChangedLimits, HostBandwidth, MigrateRequest, Migration, MigrationStage, MigrationStatus};
use hostd::lab::HostSpec;
use tests::world::{Spec, World};
use tests::{Need, mounts, ready};

const MIB: u64 = 1 << 20;

fn progress(world: &World, id: &str) -> Option<MigrationStatus> {
    world.ask("a1", async |client| client.migration(id).await).ok()?.progress
}

/// Waits until each of the migrations has this share.
fn shares(world: &World, what: &str, wanted: &[(&Migration, Option<u64>)]) {
    world.wait(what, || {
        let has = |(migration, share): &(&Migration, Option<u64>)| {
            progress(world, &migration.id).is_some_and(|progress| progress.bandwidth_bytes_per_second == *share)
        };
        wanted.iter().all(has).then_some(())
    });
}

#[test]
fn the_budget_is_kept_and_shared_anew() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::new(&[HostSpec::new("a1", "a"), HostSpec::new("b1", "b")], |config| {
        config.migration.bandwidth_bytes_per_second = Some(16 * MIB);
    });
    let specs = [Spec::busy("vm1", 0), Spec::busy("vm2", 1)];
    let start = |spec: &Spec| {
        let request =
            MigrateRequest { destination: "b1".into(), pause_before_switchover: true, ..MigrateRequest::default() };
        world.ask("a1", async |client| client.migrate(&spec.name, &request).await).expect("a migration that starts")
    };
    for spec in &specs {
        world.boot("a1", spec);
    }
    let first = start(&specs[0]);
    shares(&world, "all of it for one", &[(&first, Some(16 * MIB))]);
    let second = start(&specs[1]);
    shares(&world, "half of it for each of two", &[(&first, Some(8 * MIB)), (&second, Some(8 * MIB))]);
    let done = || [&first, &second].map(|one| progress(&world, &one.id).map_or(0, |now| now.bytes_done));
    let (before, at) = (done(), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    let (after, passed) = (done(), at.elapsed().as_secs_f64());
    let rate = (after.iter().sum::<u64>() - before.iter().sum::<u64>()) as f64 / passed / MIB as f64;
    assert!(rate < 16.0 * 1.25, "{rate:.1} MiB/s were sent of 16 allowed: {before:?} {after:?}");
    assert!(after[0] > before[0] && after[1] > before[1], "both go on: {before:?} {after:?}");

    let more = HostBandwidth { bandwidth_bytes_per_second: Some(64 * MIB) };
    world.ask("a1", async |client| client.set_bandwidth(&more).await).unwrap();
    shares(&world, "a larger budget", &[(&first, Some(32 * MIB)), (&second, Some(32 * MIB))]);
    let own = ChangedLimits {
        bandwidth_bytes_per_second: Some(Some(4 * MIB)),
        downtime_ms: Some(70),
        throttle_max_percent: None,
    };
    let changed = world.ask("a1", async |client| client.change_limits(&first.id, &own).await).unwrap();
    assert_eq!((changed.limits.bandwidth_bytes_per_second, changed.limits.downtime_ms), (Some(4 * MIB), 70));
    shares(&world, "what one may not use goes to the other", &[(&first, Some(4 * MIB)), (&second, Some(60 * MIB))]);
    // A daemon that is started anew knows both, and not what the configuration said before.
    mounts::restart_plain(&world, "a1");
    let host = world.ask("a1", async |client| client.host().await).unwrap();
    assert_eq!(host.migration_bandwidth_bytes_per_second, Some(64 * MIB));
    let again = ChangedLimits { downtime_ms: Some(71), ..ChangedLimits::default() };
    let told = world.ask("a1", async |client| client.change_limits(&first.id, &again).await).unwrap();
    assert_eq!(told.limits.bandwidth_bytes_per_second, Some(4 * MIB));
    shares(&world, "the same shares after a restart", &[(&first, Some(4 * MIB)), (&second, Some(60 * MIB))]);
    let wrong = ChangedLimits { bandwidth_bytes_per_second: Some(Some(1)), ..ChangedLimits::default() };
    assert!(world.ask("a1", async |client| client.change_limits(&first.id, &wrong).await).is_err());
    world.ask("a1", async |client| client.cancel_migration(&first.id).await).unwrap();
    assert_eq!(world.wait_migration("a1", &first.id).stage, MigrationStage::Cancelled);
    shares(&world, "all of it for the one that is left", &[(&second, Some(64 * MIB))]);

    world.wait("readiness for the switchover", || progress(&world, &second.id).filter(|now| now.waiting));
    world.check_oracles(&specs[1]);
    assert_eq!(world.machines_on("a1"), ["vm1", "vm2"], "it waits with its guest running here");
    world.ask("a1", async |client| client.continue_migration(&second.id).await).unwrap();
    let ended = world.wait_migration("a1", &second.id);
    assert_eq!(ended.stage, MigrationStage::Completed, "{ended:?}\n{}", world.logs());
    let refused = world.ask("a1", async |client| client.continue_migration(&second.id).await).unwrap_err();
    assert!(refused.to_string().contains("it has ended"), "{refused}");
    for spec in &specs {
        world.check_oracles(spec);
    }
    world.finish();
}
