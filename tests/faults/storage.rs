//! Storage at the destination that cannot be written: one error with its cause and what to do, nothing left behind, and
//! the same move works once it is repaired.

use std::path::PathBuf;

use hostd::api::types::{MigrationLimits, MigrationStage, NewDisk, Phase};
use tests::mounts;
use tests::world::{Spec, World};
use tests::{Need, ready};

use crate::refused;

/// Where `host` keeps the disks of its machines.
fn images(world: &World, host: &str) -> PathBuf {
    world.host(host).directory().join("state/machines")
}

/// Two hosts, `vm1` on the first, and a file system of its own for the disks of the second.
fn with_file_system(options: &str) -> (World, Spec) {
    let world = World::two_hosts();
    let folder = images(&world, "b1");
    let folder = folder.display();
    mounts::restart(&world, "b1", &format!("mkdir -p {folder}; mount -t tmpfs -o {options} images {folder}"));
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    (world, spec)
}

/// Nothing is left on that file system; once repaired, the move works.
fn works_after(world: World, spec: &Spec, repair: &str) {
    let folder = images(&world, "b1");
    let left = std::fs::read_dir(mounts::seen(&world, "b1", &folder).join(&spec.name)).map_or(0, Iterator::count);
    assert_eq!(left, 0, "images are left at the destination");
    mounts::run(&world, "b1", repair);
    world.moves(spec, "a1", "b1", None);
    assert_eq!(world.machines_on("b1"), std::slice::from_ref(&spec.name));
    world.finish();
}

#[test]
fn a_read_only_folder_at_the_destination() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec) = with_file_system("ro,size=256m");
    refused(&world, &spec, &["b1", "state/machines/vm1", "mount its file system writable", "Read-only file system"]);
    let repair = format!("mount -o remount,rw {}", images(&world, "b1").display());
    works_after(world, &spec, &repair);
}

#[test]
fn a_file_system_that_is_too_small_at_the_destination() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec) = with_file_system("size=48m");
    refused(&world, &spec, &["no room on host `b1`", "disk space needs 64 MiB", "48 of 48 MiB"]);
    let repair = format!("mount -o remount,size=256m {}", images(&world, "b1").display());
    works_after(world, &spec, &repair);
}

#[test]
fn a_file_system_that_fills_up_while_the_machine_is_on_its_way() {
    if !ready(Need::Kvm) {
        return;
    }
    let (world, spec) = with_file_system("size=128m");
    // So slow that much of the disk is still to come when the space is gone.
    let slow =
        MigrationLimits { bandwidth_bytes_per_second: Some(4 << 20), timeout_s: 60, ..MigrationLimits::default() };
    let started = world.start_migration("vm1", "a1", "b1", Some(slow)).expect("a migration that starts");
    world.wait("pre-copy", || {
        let migration = world.ask("a1", async |client| client.migration(&started.id).await).ok()?;
        assert!(!migration.stage.ended(), "it ended before it could be disturbed: {migration:?}");
        migration.progress.filter(|progress| progress.phase == Phase::Precopy && progress.bytes_done > 1 << 18)
    });
    let filler = images(&world, "b1").join("filler");
    // Ends when the file system is full, which dd calls an error.
    mounts::run(&world, "b1", &format!("dd if=/dev/zero of={} bs=64k 2>/dev/null || true", filler.display()));
    let ended = world.wait_migration("a1", &started.id);
    assert_eq!(ended.stage, MigrationStage::Failed, "{ended:?}");
    let error = ended.error.expect("why it failed");
    for part in ["destination", "disk0", "No space left on device", "free space"] {
        assert!(error.contains(part), "`{part}` is not in the error: {error}");
    }
    assert_eq!((world.machines_on("a1"), world.machines_on("b1")), (vec!["vm1".to_owned()], Vec::new()));
    world.check_oracles(&spec);
    works_after(world, &spec, &format!("rm {}", filler.display()));
}

#[test]
fn an_image_that_is_there_already() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    let folder = images(&world, "b1").join("vm1");
    std::fs::create_dir_all(&folder).unwrap();
    let image = folder.join("disk0.raw");
    std::fs::write(&image, "somebody else's").unwrap();
    refused(&world, &spec, &["b1", "state/machines/vm1/disk0.raw", "remove it if no machine needs it"]);
    assert_eq!(std::fs::read(&image).unwrap(), b"somebody else's", "it is not ours to remove");
    std::fs::remove_file(&image).unwrap();
    world.moves(&spec, "a1", "b1", None);
    world.finish();
}

#[test]
fn an_image_that_cannot_be_written_is_not_booted_from() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let folder = world.host("a1").directory().join("images");
    let shown = folder.display();
    let mount = format!(
        "mkdir -p {shown}; mount -t tmpfs images {shown}; truncate -s 64M {shown}/disk.raw; mount -o remount,ro {shown}"
    );
    mounts::restart(&world, "a1", &mount);
    let spec = Spec::busy("vm1", 0);
    let mut request = spec.request();
    let path = Some(folder.join("disk.raw"));
    request.disks = vec![NewDisk { id: "disk0".into(), size_mib: None, path, read_only: false, shared: false }];
    let error = world.ask("a1", async |client| client.create_machine(&request).await).unwrap_err().to_string();
    for part in ["images/disk.raw", "open for writing", "mount its file system writable", "Read-only file system"] {
        assert!(error.contains(part), "`{part}` is not in the error: {error}");
    }
    assert_eq!(world.machines_on("a1"), Vec::<String>::new());
    mounts::run(&world, "a1", &format!("mount -o remount,rw {shown}"));
    world.ask("a1", async |client| client.create_machine(&request).await).unwrap();
    world.check_oracles(&spec);
    world.finish();
}
