//! A disk on a block device, which moves into an image.

use std::path::PathBuf;
use std::process::Command;

use hostd::api::types::{DiskSize, NewDisk};
use tests::world::{Spec, World};
use tests::{Need, ready};

/// A loop device, detached when dropped.
struct Loop(PathBuf);

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
    std::fs::File::create(&file).and_then(|file| file.set_len(32 << 20)).unwrap();
    let made = Command::new("losetup").args(["--show", "--find"]).arg(&file).output().expect("losetup (util-linux)");
    assert!(made.status.success(), "this test needs a free loop device: {}", String::from_utf8_lossy(&made.stderr));
    let device = Loop(String::from_utf8(made.stdout).unwrap().trim().into());
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
