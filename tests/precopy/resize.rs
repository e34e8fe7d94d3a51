//! Disks that become larger, and disks that go.

use headroom_guest::Settings;
use hostd::api::types::{DiskSize, MachineStatus, MigrateRequest, MigrationStage, NewDisk};
use tests::world::{Spec, World};
use tests::{Need, mounts, ready};

/// A machine with a small disk, of which its guest uses all.
fn spec() -> Spec {
    let mut spec = Spec { disk_mib: 8, ..Spec::busy("vm1", 0) };
    (spec.workload.disk_mib, spec.workload.disk_mib_per_second) = (8, 32);
    spec
}

fn resize(world: &World, host: &str, id: &str, mib: u64) -> Result<u64, String> {
    let size = DiskSize { id: id.to_owned(), bytes: mib << 20 };
    let machine = world.ask(host, async |client| client.resize_disk("vm1", &size).await);
    let machine = machine.map_err(|error| format!("{:?} {error}", error.status()))?;
    Ok(machine.disks.iter().find(|disk| disk.id == id).expect("the disk").bytes >> 20)
}

/// The guest uses `mib` of its disk, and reads back all of it at least once.
fn uses(world: &World, spec: &Spec, mib: u32) {
    let before = world.set(spec, Settings { disk_mib: Some(mib), ..Settings::default() });
    assert_eq!(before.workload.disk_mib, mib, "the guest sees the whole disk");
    // Twice written, so that each block was read once in between.
    let blocks = 3 * u64::from(mib) * 256;
    world.wait_guest(spec, "to use all of its disk", |status| {
        status.disk_blocks_written >= before.disk_blocks_written + blocks
    });
    world.check_oracles(spec);
}

#[test]
fn a_disk_grows_here_is_known_after_a_restart_moves_and_grows_there() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = spec();
    let machine = world.boot("a1", &spec);
    uses(&world, &spec, 8);
    assert_eq!(world.set(&spec, Settings { disk_mib: Some(24), ..Settings::default() }).workload.disk_mib, 8);
    assert_eq!(resize(&world, "a1", "disk0", 24), Ok(24));
    uses(&world, &spec, 24);
    for (id, mib, expected) in
        [("disk0", 16, "cannot shrink"), ("disk1", 32, "it has disk0"), ("disk0", 17 << 20, "at most 16777216 MiB")]
    {
        let refused = resize(&world, "a1", id, mib).unwrap_err();
        assert!(refused.starts_with("Some(4") && refused.contains(expected), "{refused}");
    }

    // The next daemon knows it, also if the last one had no time to write it down.
    mounts::restart_plain(&world, "a1");
    let bytes = |host: &str| world.ask(host, async |client| client.machine("vm1").await).unwrap().disks[0].bytes;
    assert_eq!(bytes("a1"), 24 << 20);
    let size = vmm::api::DiskSize { id: "disk0".into(), bytes: 28 << 20 };
    vmm::api::client::Client::new(&machine.api_socket).resize_disk(&size).unwrap();
    mounts::restart_plain(&world, "a1");
    world.wait("the daemon to see it", || (bytes("a1") == 28 << 20).then_some(()));

    // Held back before its switchover it is on its way for as long as we look at it.
    let request =
        MigrateRequest { destination: "b1".into(), pause_before_switchover: true, ..MigrateRequest::default() };
    let started = world.ask("a1", async |client| client.migrate("vm1", &request).await).unwrap();
    let refused = resize(&world, "a1", "disk0", 32).unwrap_err();
    assert!(refused.starts_with("Some(409)") && refused.contains("cancel it"), "{refused}");
    let detached = world.ask("a1", async |client| client.detach_disk("vm1", "disk0").await).unwrap_err();
    assert!(detached.status() == Some(409) && detached.to_string().contains("cancel it"), "{detached}");
    world.wait("the migration to be ready", || {
        let migration = world.ask("a1", async |client| client.migration(&started.id).await).unwrap();
        migration.progress.is_some_and(|progress| progress.waiting).then_some(())
    });
    assert!(resize(&world, "b1", "disk0", 32).unwrap_err().starts_with("Some(409)"), "not where it arrives either");
    world.ask("a1", async |client| client.continue_migration(&started.id).await).unwrap();
    let ended = world.wait_migration("a1", &started.id);
    assert_eq!(ended.stage, MigrationStage::Completed, "{:?}\n{}", ended.error, world.logs());
    assert_eq!(bytes("b1"), 28 << 20);
    uses(&world, &spec, 28);
    // Its VMM may still verify what has come.
    world.wait("a larger disk at the destination", || resize(&world, "b1", "disk0", 40).ok());
    uses(&world, &spec, 40);
    world.moves(&spec, "b1", "a1", None);
    assert_eq!(bytes("a1"), 40 << 20);
    world.finish();
}

#[test]
fn a_disk_goes_from_a_stopped_machine_and_its_image_stays() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = spec();
    let mut request = spec.request();
    request.disks.push(NewDisk { id: "disk1".into(), size_mib: Some(4), path: None, read_only: false, shared: false });
    let machine = world.ask("a1", async |client| client.create_machine(&request).await).unwrap();
    world.wait_guest(&spec, "to be ready", |status| status.ready);
    let detach = |id: &str| world.ask("a1", async |client| client.detach_disk("vm1", id).await);
    let refused = detach("disk1").unwrap_err();
    assert!(refused.status() == Some(409) && refused.to_string().contains("machine stop"), "{refused}");
    world.set(&spec, Settings { power_off: true, ..Settings::default() });
    world.wait("the machine to stop", || {
        let machine = world.ask("a1", async |client| client.machine("vm1").await).unwrap();
        (machine.status == MachineStatus::Stopped).then_some(())
    });
    assert_eq!(resize(&world, "a1", "disk0", 16), Ok(16), "a stopped machine's disk grows as well");
    let gone = detach("disk1").unwrap();
    assert!(!gone.owned && gone.path == machine.disks[1].path, "{gone:?}");
    assert_eq!(detach("disk1").unwrap_err().status(), Some(404));
    let started = world.ask("a1", async |client| client.start_machine("vm1").await).unwrap();
    assert_eq!(started.disks.len(), 1);
    world.wait_guest(&spec, "to be ready", |status| status.ready);
    uses(&world, &spec, 16);
    world.ask("a1", async |client| client.delete_machine("vm1").await).unwrap();
    assert!(gone.path.exists() && !machine.disks[0].path.exists());
    std::fs::remove_dir_all(gone.path.parent().unwrap()).unwrap();
    world.finish();
}
