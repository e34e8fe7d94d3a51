//! A disk on a block device, which moves into an image; and one that both hosts have, which is handed over.

use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use hostd::api::types::{DiskSize, NewDisk};
use hostd::lab::HostSpec;
use tests::world::{Spec, World};
use tests::{Need, mounts, ready};

use super::shared::{handed_over, in_use, machine, refused};

/// A loop device, detached when dropped.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path, mib: u64) -> Self {
        File::create(file).and_then(|file| file.set_len(mib << 20)).unwrap();
        let made = Command::new("losetup").args(["--show", "--find"]).arg(file).output().expect("losetup (util-linux)");
        assert!(made.status.success(), "this test needs a free loop device: {}", String::from_utf8_lossy(&made.stderr));
        Self(String::from_utf8(made.stdout).unwrap().trim().into())
    }

    fn in_use(&self) -> bool {
        in_use(&self.0)
    }
}

/// A folder for names of devices, as /dev/mapper is one; removed when dropped.
struct Names(PathBuf);

impl Names {
    fn new() -> Self {
        let folder = PathBuf::from(format!("/dev/headroom-test-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        let removed = std::fs::remove_dir_all(&self.0);
        assert!(std::thread::panicking() || removed.is_ok());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.0).status();
        assert!(std::thread::panicking() || detached.unwrap().success());
    }
}

#[test]
fn a_machine_on_a_block_device_moves_and_the_device_stays() {
    if !ready(Need::Kvm) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("volume");
    let device = Loop::new(&file, 32);
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    let mut request = spec.request();
    let path = Some(device.0.clone());
    request.disks = vec![NewDisk { id: "disk0".into(), size_mib: None, path, read_only: false, shared: false }];
    let machine = world.ask("a1", async |client| client.create_machine(&request).await).unwrap();
    assert_eq!((machine.disks[0].bytes, machine.disks[0].owned), (32 << 20, false));
    world.check_oracles(&spec);

    // It takes the size that the device has, and no other.
    let resize = |mib: u64| {
        let size = DiskSize { id: "disk0".into(), bytes: mib << 20 };
        world.ask("a1", async |client| client.resize_disk("vm1", &size).await)
    };
    let refused = resize(48).unwrap_err();
    assert!(refused.status() == Some(422) && refused.to_string().contains("enlarged first"), "{refused}");
    std::fs::File::options().write(true).open(&file).and_then(|file| file.set_len(48 << 20)).unwrap();
    assert!(Command::new("losetup").arg("--set-capacity").arg(&device.0).status().unwrap().success());
    assert_eq!(resize(48).unwrap().disks[0].bytes, 48 << 20);

    let report = world.moves(&spec, "a1", "b1", None);
    assert_eq!(report.verification.disk_digest_ok, Some(true), "{report:?}");
    let there = world.ask("b1", async |client| client.machine("vm1").await).unwrap();
    assert!(there.disks[0].owned && there.disks[0].bytes == 48 << 20, "{there:?}");
    assert!(device.0.exists(), "what hostd did not make it leaves alone");
    world.finish();
}

#[test]
fn a_shared_block_device_is_handed_over_there_and_back() {
    if !ready(Need::Kvm) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let device = Loop::new(&folder.path().join("volume"), 64);
    let other = Loop::new(&folder.path().join("other"), 64);
    let names = Names::new();
    let name = names.0.join("vm1");
    symlink(&device.0, &name).unwrap();
    // Whoever may write to storage that hosts share must not name them a device.
    let outside = folder.path().join("vm1");
    symlink(&device.0, &outside).unwrap();
    let dirs = vec![names.0.clone(), folder.path().to_owned()];
    let world = World::new(&["a1", "b1", "b2"].map(|host| HostSpec::new(host, &host[..1])), |config| {
        config.shared_dirs = if config.host == "b2" { Vec::new() } else { dirs.clone() };
    });
    let (_, request) = machine(&outside);
    let error = world.ask("a1", async |client| client.create_machine(&request).await).unwrap_err();
    assert!(error.status() == Some(422) && error.to_string().contains("/dev/mapper"), "{error}");
    let (spec, request) = machine(&name);
    world.ask("a1", async |client| client.create_machine(&request).await).unwrap();
    world.check_oracles(&spec);
    assert!(device.in_use() && !other.in_use());
    for (from, to) in [("a1", "b1"), ("b1", "a1")] {
        handed_over(&world, &spec, from, to, &name);
        assert!(device.in_use(), "nobody else can have it");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3, "a device needs no mark");

    // On b1 the name now leads to another device of the same size; b2 was told of no shared devices.
    let shown = names.0.display();
    let exchange = format!("mount -t tmpfs other {shown}; ln -s {} {shown}/vm1", other.0.display());
    mounts::restart(&world, "b1", &exchange);
    for (host, expected) in [("b1", "cannot be told from other devices"), ("b2", "shared_dirs")] {
        refused(&world, &spec, host, expected, &device.0);
        assert!(!other.in_use());
    }
    world.ask("a1", async |client| client.delete_machine("vm1").await).unwrap();
    assert!(!device.in_use(), "it is nobody's, and still there");
    world.finish();
}
