//! A post-copy that cannot be finished: both hosts say so, the machine never goes on with a part of itself missing, and the
//! operator can start it from its disks.

use std::process::Command;

use hostd::api::types::{Machine, MachineStatus, Migration, MigrationStage};
use hostd::lab::{HostSpec, binary};
use migration::policy::MigrationMode;
use tests::world::{Spec, World};
use tests::{Need, ready};

use super::{in_postcopy, limits, storm};

/// Two hosts, and a machine in the middle of a slow post-copy from `a1` to `b1`. A destination waits 5 s for its source if
/// `patient` is false, else as long as by default.
fn under_way(patient: bool) -> (World, Spec, Migration) {
    let world = World::new(&[HostSpec::new("a1", "a"), HostSpec::new("b1", "b")], |config| {
        if !patient {
            config.migration.recover_s = 5;
        }
    });
    let spec = storm("vm1");
    world.boot("a1", &spec);
    let started = world.start_migration("vm1", "a1", "b1", limits(MigrationMode::Postcopy, 4)).unwrap();
    let migration = in_postcopy(&world, &started.id);
    (world, spec, migration)
}

fn machine(world: &World, host: &str) -> Machine {
    world.ask(host, async |client| client.machine("vm1").await).expect("the machine")
}

/// Waits until the migration hangs at `host`: its link is lost.
fn hanging(world: &World, host: &str, id: &str) -> Migration {
    world.wait("a hanging post-copy", || {
        let migration = world.ask(host, async |client| client.migration(id).await).ok()?;
        migration.hangs().then_some(migration)
    })
}

fn kill(pid: Option<u32>) {
    let pid = pid.expect("a running VMM").to_string();
    // Its number was read from the daemon that waits for it, so it cannot belong to another process.
    assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
}

/// Both hosts have given the machine up; it starts anew where its disks are whole, and nowhere else.
fn lost_on_both(world: World, spec: &Spec, id: &str) {
    for host in ["a1", "b1"] {
        let ended = world.wait_migration(host, id);
        assert_eq!(ended.stage, MigrationStage::Lost, "{host}: {ended:?}\n{}", world.logs());
        let there = world.wait("a stopped machine", || Some(machine(&world, host)).filter(|vm| vm.pid.is_none()));
        assert_eq!(there.status, MachineStatus::Stopped, "{host}: {there:?}");
        assert!(there.reason.as_ref().is_some_and(|reason| reason.contains("lost in post-copy")), "{there:?}");
    }
    let audit = world.ask("b1", async |client| client.audit(100).await).unwrap();
    assert!(audit.iter().any(|record| record.action == "alarm" && record.detail.contains("lost in post-copy")));
    let refused = world.ask("b1", async |client| client.start_machine("vm1").await).unwrap_err();
    assert!(refused.to_string().contains("lack blocks"), "{refused}");
    world.ask("b1", async |client| client.delete_machine("vm1").await).unwrap();
    world.ask("a1", async |client| client.start_machine("vm1").await).expect("it starts from its disks");
    world.wait_guest(spec, "to be ready again", |status| status.ready);
    world.check_oracles(spec);
    world.finish();
}

#[test]
fn an_operator_abandons_it_at_the_source_and_the_hosts_agree_once_they_can_talk() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec, migration) = under_way(true);
    let refused = world.ask("a1", async |client| client.abandon_migration(&migration.id).await).unwrap_err();
    assert!(refused.to_string().contains("its link works"), "{refused}");
    world.lab.fabric().set_link("b1", false).unwrap();
    hanging(&world, "a1", &migration.id);
    world.ask("a1", async |client| client.abandon_migration(&migration.id).await).expect("it can be abandoned now");
    // Nobody else can say that the machine does not run there: it is in doubt until the hosts can talk.
    let doubtful =
        world.wait("doubt", || Some(machine(&world, "a1")).filter(|machine| machine.status == MachineStatus::InDoubt));
    assert_eq!(doubtful.migration.as_deref(), Some(migration.id.as_str()));
    let refused = world.ask("a1", async |client| client.abandon_migration(&migration.id).await).unwrap_err();
    assert!(refused.to_string().contains("settling"), "{refused}");
    world.lab.fabric().set_link("b1", true).unwrap();
    lost_on_both(world, &spec, &migration.id);
}

#[test]
fn an_operator_abandons_it_at_the_destination() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec, migration) = under_way(true);
    world.lab.fabric().set_link("b1", false).unwrap();
    hanging(&world, "b1", &migration.id);
    world.ask("b1", async |client| client.abandon_migration(&migration.id).await).expect("it can be abandoned");
    assert_eq!(world.wait_migration("b1", &migration.id).stage, MigrationStage::Lost);
    world.lab.fabric().set_link("b1", true).unwrap();
    lost_on_both(world, &spec, &migration.id);
}

#[test]
fn a_source_that_dies_is_not_waited_for() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec, migration) = under_way(true);
    let start = std::time::Instant::now();
    kill(machine(&world, "a1").pid);
    let ended = world.wait_migration("b1", &migration.id);
    assert_eq!(ended.stage, MigrationStage::Lost, "{ended:?}");
    assert!(start.elapsed().as_secs() < 60, "not after recover_s, which is 600 s");
    lost_on_both(world, &spec, &migration.id);
}

#[test]
fn a_destination_that_dies_is_not_reconnected_to() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec, migration) = under_way(true);
    kill(machine(&world, "b1").pid);
    lost_on_both(world, &spec, &migration.id);
}

/// Its daemon has never seen it in post-copy: only the VMM itself could say that a part of it was missing.
#[test]
fn a_destination_that_dies_unseen_is_not_taken_for_one_that_has_everything() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = storm("vm1");
    world.boot("a1", &spec);
    let started = world.start_migration("vm1", "a1", "b1", limits(MigrationMode::Postcopy, 4)).unwrap();
    let pid = world.wait("pre-copy", || {
        let migration = world.ask("a1", async |client| client.migration(&started.id).await).ok()?;
        migration.progress.filter(|progress| progress.bytes_done > 1 << 20)?;
        machine(&world, "b1").pid
    });
    world.host("b1").kill_daemon();
    in_postcopy(&world, &started.id);
    kill(Some(pid));
    world.host("b1").spawn_daemon(&binary("hostd").unwrap()).unwrap();
    world.host("b1").wait_ready().unwrap();
    lost_on_both(world, &spec, &started.id);
}

#[test]
fn a_destination_waits_as_long_as_it_was_configured() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec, migration) = under_way(false);
    world.lab.fabric().set_link("b1", false).unwrap();
    let ended = world.wait_migration("b1", &migration.id);
    assert_eq!(ended.stage, MigrationStage::Lost, "{ended:?}");
    assert!(ended.error.as_ref().is_some_and(|error| error.contains("did not come back in time")), "{ended:?}");
    world.lab.fabric().set_link("b1", true).unwrap();
    lost_on_both(world, &spec, &migration.id);
}
