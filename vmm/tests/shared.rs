//! A disk on storage that both hosts have is handed over and not copied; the guest's own oracle reads back what it wrote to it.

mod common;

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use common::{Lab, Vmm, guest, identity, listen, ready, sending, until};
use headroom_guest::{Client as Guest, Status};
use migration::policy::MigrationMode;
use migration::report::{Outcome, Report};
use migration::testing::Authority;
use vmm::api::MachineState;
use vmm::config::{MigrationLimits, ReceiveConfig};

const WORKLOAD: &str = "ip=10.0.0.2/24 sweep=16:32 disk=8:8 hb=100";

struct World {
    lab: Lab,
    authority: Authority,
    guest: Guest,
    made: u32,
}

impl World {
    fn new() -> (Self, Vmm) {
        let lab = Lab::new();
        lab.disk("shared", 32);
        let mut world = Self { lab, authority: Authority::new(), guest: guest(), made: 0 };
        let here = world.host(&[]);
        until("the guest to be ready", Duration::from_secs(60), || world.guest.status().ok().filter(|now| now.ready));
        (world, here)
    }

    /// A VMM with the shared disk, and a read-only one of its own.
    fn host(&mut self, arguments: &[&str]) -> Vmm {
        self.made += 1;
        let (tap, name) = (format!("tap{}", self.made), format!("vmm{}", self.made));
        self.lab.tap(&tap);
        let own = self.lab.disk(&format!("own{}", self.made), 4);
        if self.made == 1 {
            std::fs::write(&own, vec![0x5a; 4 << 20]).expect("its data");
        }
        let shared = self.lab.directory.path().join("shared");
        let mut config = self.lab.config(96, WORKLOAD, &tap, &shared);
        config["disks"] = serde_json::json!([
            {"id": "disk0", "path": shared, "shared": true},
            {"id": "disk1", "path": own, "read_only": true},
        ]);
        self.lab.vmm(&name, &config, arguments)
    }

    fn moves(&mut self, id: &str, from: &Vmm, mode: MigrationMode) -> (Vmm, Report) {
        let to = self.host(&["--incoming"]);
        assert!(self.in_use(), "the source has it");
        let address = listen(&self.authority, &to, id, 20);
        let limits = MigrationLimits { mode, ..MigrationLimits::default() };
        from.client.send(&sending(&self.authority, id, address, limits)).expect("it starts");
        let report = from.migrated().report.expect("a report");
        assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
        to.migrated();
        assert_eq!((from.state(), to.state()), (MachineState::Fenced, MachineState::Running));
        (to, report)
    }

    /// Whether somebody has locked the shared disk.
    fn in_use(&self) -> bool {
        let image = File::open(self.lab.directory.path().join("shared")).expect("the shared disk");
        image.try_lock().is_err()
    }

    fn own(&self, number: u32) -> Vec<u8> {
        std::fs::read(self.lab.directory.path().join(format!("own{number}"))).expect("an image")
    }

    /// The guest has read back all that it writes to memory and disk, since now, and found it as it was.
    fn healthy(&mut self) {
        let since = until("an answer", Duration::from_secs(20), || self.guest.status().ok());
        let wanted = |now: &Status| now.disk_blocks_checked >= since.disk_blocks_checked + 256;
        let now =
            until("the guest to look at its disk", Duration::from_secs(60), || self.guest.status().ok().filter(wanted));
        assert_eq!((now.sweep_errors, now.disk_errors, now.fill_errors), (0, 0, 0), "{now:?}");
    }
}

#[test]
fn it_goes_there_and_on_by_every_way() {
    if !ready("shared") {
        return;
    }
    let (mut world, mut here) = World::new();
    world.healthy();
    let modes = [MigrationMode::Precopy, MigrationMode::Postcopy, MigrationMode::Hybrid];
    for (number, mode) in (1..).zip(modes) {
        let possible = mode != MigrationMode::Postcopy || vmm::memory::uffd::check().is_ok();
        let mode = if possible { mode } else { MigrationMode::Precopy };
        let (there, report) = world.moves(&format!("mig-{number}"), &here, mode);
        assert!(world.in_use(), "the destination has it");
        // Nothing but the read-only disk was copied, and that one can be filled although the guest may not write to it.
        assert!(report.disk.bytes_sent <= 5 << 20, "{:?}", report.disk);
        assert!(world.own(number + 1) == vec![0x5a; 4 << 20], "the read-only disk has come with what it held");
        assert_eq!(report.verification.memory_digest_ok, Some(true), "{}", report.reason);
        // The source ends only now: what it still had open would matter.
        assert_eq!(here.quit(), Some(0));
        assert!(world.in_use(), "the end of the source takes nothing from the destination");
        world.healthy();
        here = there;
    }
    assert_eq!(here.quit(), Some(0));
    assert!(!world.in_use());
}

/// The destination has taken the disk over and fails then, after Commit: it leaves the disk first and says so after, and the source
/// goes on with it.
#[test]
fn a_late_failure_gives_it_back() {
    if !ready("shared") {
        return;
    }
    let (mut world, here) = World::new();
    world.healthy();
    let there = world.host(&["--incoming"]);
    let receive = ReceiveConfig {
        id: "mig-1".into(),
        listen: "127.0.0.1:0".parse().expect("an address"),
        token: common::TOKEN.into(),
        source_host: "a".into(),
        destination_host: "b".into(),
        tls: identity(&world.authority, "b"),
        deadline_s: 60,
        recover_s: 20,
        // Nothing can be noted there: the machine is not run.
        mark: Some("/dev/full".into()),
        reuse_disks: false,
    };
    let address = there.client.receive(&receive).expect("it listens").address;
    here.client.send(&sending(&world.authority, "mig-1", address, MigrationLimits::default())).expect("it starts");
    let report = here.migrated().report.expect("a report");
    assert_eq!(report.outcome, Outcome::Failed, "{}", report.reason);
    assert!(report.reason.contains("mark that the machine runs here"), "{}", report.reason);
    assert_eq!(here.state(), MachineState::Running);
    assert!(world.in_use(), "the source has it again");
    drop(there);
    assert!(world.in_use());
    world.healthy();
    // And it can leave once more.
    let (there, _) = world.moves("mig-2", &here, MigrationMode::Precopy);
    assert_eq!(here.quit(), Some(0));
    world.healthy();
    drop(there);
}

/// Two machines on one shared disk are refused as on any other.
#[test]
fn it_has_one_user_at_a_time() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("image");
    File::create(&image).and_then(|file| file.set_len(1 << 20)).expect("an image");
    let config = |read_only| vmm::config::DiskConfig {
        id: "disk0".into(),
        source: vmm::config::DiskSource::Path(Path::new(&image).into()),
        read_only,
        shared: true,
    };
    use vmm::disk::{Image, Purpose};
    let now = Duration::ZERO;
    let source = Image::open(&config(false), Purpose::Use).expect("the first");
    assert!(Image::open(&config(false), Purpose::Use).is_err());
    let destination = Image::open(&config(false), Purpose::Arrival).expect("it waits");
    assert!(destination.take_over(now).is_err(), "it is in use");
    source.hand_over().expect("left");
    destination.take_over(now).expect("taken");
    destination.take_over(now).expect("idempotent");
    assert!(source.take_over(now).is_err());
    destination.hand_over().expect("left");
    source.take_over(now).expect("taken back");
    drop((source, destination));
    // Any number may read.
    let readers = [Purpose::Use, Purpose::Arrival, Purpose::Use]
        .map(|purpose| Image::open(&config(true), purpose).expect("a reader"));
    readers[0].hand_over().expect("nothing to do");
    assert!(Image::open(&config(false), Purpose::Use).is_err());
    readers[1].take_over(now).expect("nothing to do");
}
