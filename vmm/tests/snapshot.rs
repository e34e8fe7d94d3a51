//! A machine that is saved, ends, and goes on in another process.

mod common;

use std::time::{Duration, Instant};

use common::{Lab, ready, until};
use headroom_guest::{Client as Guest, Settings};
use vmm::api::{DiskSize, MachineState};

const WORKLOAD: &str = "ip=10.0.0.2/24 sweep=16:100 disk=8:8 cpu=5 fill=32 hb=100";

#[test]
fn a_busy_guest_goes_on_from_a_directory() {
    if !ready("a_busy_guest_goes_on_from_a_directory") {
        return;
    }
    let lab = Lab::new();
    lab.tap("tap0");
    let disk = lab.disk("disk0", 16);
    let config = lab.config(128, WORKLOAD, "tap0", &disk);
    let first = lab.vmm("first", &config, &[]);
    let mut guest = Guest::connect("10.0.0.2:9000".parse().expect("an address")).expect("a socket");
    guest.set_deadline(Duration::from_secs(20));
    until("work", Duration::from_secs(60), || {
        guest.status().ok().filter(|status| status.sweep_step > 2 && status.disk_sequence > 2)
    });
    let larger = |bytes| first.client.resize_disk(&DiskSize { id: "disk0".into(), bytes });
    assert_eq!(larger(32 << 20).expect("a larger disk").bytes, 32 << 20);
    assert_eq!(larger(16 << 20).expect_err("it shrinks").status(), Some(422));
    let unknown = DiskSize { id: "disk1".into(), bytes: 32 << 20 };
    assert_eq!(first.client.resize_disk(&unknown).expect_err("there is none").status(), Some(404));
    guest.set(Settings { disk_mib: Some(32), ..Settings::default() }).expect("an answer");
    let path = lab.directory.path().join("snapshot");
    assert_eq!(first.client.save(&path).expect_err("it runs").status(), Some(409));
    let before = guest.status().expect("an answer");
    assert_eq!(first.client.pause().expect("paused").state, MachineState::Paused);
    first.client.save(&path).expect("saved");
    let digest = first.client.digest().expect("a digest");
    assert_eq!(first.client.save(&path).expect_err("it exists").status(), Some(409));
    assert_eq!(first.quit(), Some(0));

    // Guest time stands still while it lies in the file.
    std::thread::sleep(Duration::from_secs(2));
    let start = Instant::now();
    let second = lab.vmm("second", &config, &["--restore", path.to_str().expect("a path")]);
    let status = until("the guest's answer", Duration::from_secs(30), || guest.status().ok());
    let passed = start.elapsed().as_millis() as u64;
    assert_eq!((status.sweep_errors, status.disk_errors), (0, 0), "{status:?}");
    assert_eq!(status.workload.disk_mib, 32, "the guest uses all of the disk that it was told of");
    assert!(status.uptime_ms >= before.uptime_ms, "guest time went back");
    // It ran for a moment between the answer and the pause.
    assert!(status.uptime_ms <= before.uptime_ms + passed + 500, "{} to {}", before.uptime_ms, status.uptime_ms);
    let later = until("more work", Duration::from_secs(30), || {
        guest.status().ok().filter(|now| now.sweep_step > status.sweep_step && now.disk_sequence > status.disk_sequence)
    });
    assert_eq!((later.sweep_errors, later.disk_errors), (0, 0), "{later:?}");
    second.client.pause().expect("paused");
    assert_ne!(second.client.digest().expect("a digest").memory, digest.memory);
    assert_eq!(second.quit(), Some(0));
}
