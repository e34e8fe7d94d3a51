//! Disks on storage that both hosts have.

use std::fs::File;
use std::path::Path;

use hostd::api::types::{MigrationStage, NewDisk};
use hostd::lab::HostSpec;
use tests::world::{Spec, World};
use tests::{Need, mounts, ready};

/// A machine whose disk is `image`, or a device.
pub fn machine(image: &Path) -> (Spec, hostd::api::types::CreateMachine) {
    let spec = Spec::busy("vm1", 0);
    let mut request = spec.request();
    request.disks =
        vec![NewDisk { id: "disk0".into(), size_mib: None, path: Some(image.into()), read_only: false, shared: true }];
    (spec, request)
}

/// Whether a process has locked it.
pub fn in_use(image: &Path) -> bool {
    File::open(image).unwrap().try_lock().is_err()
}

/// Moves the machine, whose disk of that name is not copied.
pub fn handed_over(world: &World, spec: &Spec, from: &str, to: &str, name: &Path) {
    let migration = world.migrate("vm1", from, to, None);
    assert_eq!(migration.stage, MigrationStage::Completed, "{:?}\n{}", migration.error, world.logs());
    let report = migration.report.expect("a report");
    assert_eq!((report.disk.bytes_sent, report.disk.bytes_skipped), (0, 0), "{:?}", report.disk);
    let there = world.ask(to, async |client| client.machine("vm1").await).unwrap();
    assert!(there.disks[0].shared && !there.disks[0].owned && there.disks[0].path == name, "{there:?}");
    world.check_oracles(spec);
}

/// The machine cannot move from a1 to `host`, which says so, and keeps its disk.
pub fn refused(world: &World, spec: &Spec, host: &str, expected: &str, disk: &Path) {
    let error = match world.start_migration("vm1", "a1", host, None) {
        Err(error) => error.to_string(),
        Ok(migration) => {
            let migration = world.wait_migration("a1", &migration.id);
            assert_eq!(migration.stage, MigrationStage::Failed, "{migration:?}");
            migration.error.expect("why it failed")
        }
    };
    assert!(error.contains(expected), "`{expected}` is not in the error: {error}");
    assert!(in_use(disk), "the source still has it");
    world.check_oracles(spec);
}

#[test]
fn a_shared_disk_is_handed_over_there_and_back() {
    if !ready(Need::Kvm) {
        return;
    }
    let storage = tempfile::tempdir().unwrap();
    let image = storage.path().join("vm1.raw");
    File::create(&image).and_then(|file| file.set_len(64 << 20)).unwrap();
    let folder = storage.path().to_owned();
    let world = World::new(&[HostSpec::new("a1", "a"), HostSpec::new("b1", "b")], |config| {
        config.shared_dirs = vec![folder.clone()];
    });
    let (spec, request) = machine(&image);
    world.ask("a1", async |client| client.create_machine(&request).await).unwrap();
    world.check_oracles(&spec);
    for (from, to) in [("a1", "b1"), ("b1", "a1"), ("a1", "b1")] {
        handed_over(&world, &spec, from, to, &image);
        let names = std::fs::read_dir(storage.path()).unwrap().count();
        assert_eq!(names, 1, "no mark is left beside the image");
    }
    world.ask("b1", async |client| client.delete_machine("vm1").await).unwrap();
    assert!(image.exists() && !in_use(&image), "it is nobody's, and still there");
    world.finish();
}

#[test]
fn a_destination_with_another_file_or_none_is_refused() {
    if !ready(Need::Kvm) {
        return;
    }
    let storage = tempfile::tempdir().unwrap();
    let image = storage.path().join("vm1.raw");
    File::create(&image).and_then(|file| file.set_len(64 << 20)).unwrap();
    let folder = storage.path().to_owned();
    let world = World::new(&["a1", "b1", "b2"].map(|host| HostSpec::new(host, &host[..1])), |config| {
        config.shared_dirs = if config.host == "b2" { Vec::new() } else { vec![folder.clone()] };
    });
    // On b1 something else is mounted there, with a file of the same name and size.
    let shown = storage.path().display();
    mounts::restart(&world, "b1", &format!("mount -t tmpfs other {shown}; truncate -s 64M {shown}/vm1.raw"));
    let (spec, request) = machine(&image);
    world.ask("a1", async |client| client.create_machine(&request).await).unwrap();
    world.check_oracles(&spec);
    for (host, expected) in [("b1", "is not the file that the source has"), ("b2", "shared_dirs")] {
        refused(&world, &spec, host, expected, &image);
    }
    assert_eq!(std::fs::read_dir(storage.path()).unwrap().count(), 1, "no mark is left beside the image");
    // A host that was told of no shared storage does not make such a machine either.
    let request = hostd::api::types::CreateMachine { name: "vm2".into(), ..request };
    let error = world.ask("b2", async |client| client.create_machine(&request).await).unwrap_err().to_string();
    assert!(error.contains("shared_dirs"), "{error}");
    world.finish();
}
