//! Post-copy of real machines between two VMM processes: on userfaultfd, over TLS, with the guest's own oracles as judges.

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use common::{Lab, Vmm, guest, listen, ready, sending, until};
use headroom_guest::{Client as Guest, Status};
use migration::policy::MigrationMode;
use migration::report::{Mode, Outcome, Report};
use migration::testing::{Authority, Proxy};
use vmm::api::{MachineState, MigrationStatus, Phase};
use vmm::config::MigrationLimits;

/// Writes a word into each page of 48 MiB ten times a second: far above every link below.
const WORKLOAD: &str = "ip=10.0.0.2/24 sweep=48:400 disk=8:8 cpu=5 fill=48 hb=100";
const MEMORY_MIB: u64 = 160;

fn possible(test: &str) -> bool {
    if !ready(test) {
        return false;
    }
    match vmm::memory::uffd::check() {
        Ok(()) => true,
        Err(error) => {
            eprintln!("skipped {test}: {error}");
            false
        }
    }
}

fn limits(mode: MigrationMode, mib_per_second: u64) -> MigrationLimits {
    MigrationLimits { mode, bandwidth_bytes_per_second: Some(mib_per_second << 20), ..MigrationLimits::default() }
}

const ID: &str = "post-1";

fn send(authority: &Authority, from: &Vmm, address: SocketAddr, limits: MigrationLimits) {
    from.client.send(&sending(authority, ID, address, limits)).expect("it starts");
}

struct World {
    lab: Lab,
    authority: Authority,
    guest: Guest,
    made: u32,
}

impl World {
    fn new() -> (Self, Vmm) {
        let lab = Lab::new();
        let mut world = Self { lab, authority: Authority::new(), guest: guest(), made: 0 };
        let here = world.host(&[]);
        until("the guest to be ready", Duration::from_secs(60), || world.guest.status().ok().filter(|now| now.ready));
        (world, here)
    }

    fn host(&mut self, arguments: &[&str]) -> Vmm {
        self.made += 1;
        let (tap, name) = (format!("tap{}", self.made), format!("vmm{}", self.made));
        self.lab.tap(&tap);
        let disk = self.lab.disk(&format!("disk{}", self.made), 16);
        self.lab.vmm(&name, &self.lab.config(MEMORY_MIB, WORKLOAD, &tap, &disk), arguments)
    }

    /// The guest has read back all that it sweeps, in memory and on disk, since now, and found it as it was.
    fn healthy(&mut self) {
        let since = until("an answer", Duration::from_secs(20), || self.guest.status().ok());
        let wanted = |now: &Status| {
            now.sweep_pages_checked >= since.sweep_pages_checked + 48 * 256
                && now.disk_blocks_checked >= since.disk_blocks_checked + 64
        };
        let now = until("the guest to look at everything", Duration::from_secs(60), || {
            self.guest.status().ok().filter(wanted)
        });
        assert_eq!((now.sweep_errors, now.disk_errors, now.fill_errors), (0, 0, 0), "{now:?}");
    }
}

fn status(vmm: &Vmm) -> MigrationStatus {
    vmm.client.migration().expect("an answer").expect("a migration")
}

fn in_postcopy(vmm: &Vmm) {
    until("post-copy", Duration::from_secs(60), || {
        let status = status(vmm);
        assert_ne!(status.phase, Phase::Ended, "{status:?}");
        (status.phase == Phase::Postcopy).then_some(())
    });
}

fn arrived(report: &Report) {
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    let equal = (report.verification.memory_digest_ok, report.verification.disk_digest_ok);
    assert_eq!(equal, (Some(true), Some(true)), "{report:?}");
    eprintln!("{:?}, total {:.0} ms, {:?}", report.downtime_ms, report.total_ms, report.postcopy);
}

#[test]
fn a_guest_that_outruns_the_link_falls_over_to_postcopy() {
    if !possible("a_guest_that_outruns_the_link_falls_over_to_postcopy") {
        return;
    }
    let (mut world, here) = World::new();
    let there = world.host(&["--incoming"]);
    let address = listen(&world.authority, &there, ID, 20);
    send(&world.authority, &here, address, limits(MigrationMode::Hybrid, 8));
    let report = here.migrated().report.expect("the source has a report");
    arrived(&report);
    assert_eq!(report.mode, Mode::Hybrid);
    let totals = report.postcopy.expect("post-copy totals");
    assert!(totals.faults > 0 && totals.fault_us_p99 >= totals.fault_us_p50 && totals.fault_us_p50 > 0.0, "{totals:?}");
    assert_eq!((here.state(), there.state()), (MachineState::Fenced, MachineState::Running));
    assert_eq!(there.migrated().error, None);
    world.healthy();
    assert_eq!((here.quit(), there.quit()), (Some(0), Some(0)));
}

#[test]
fn there_and_back_by_postcopy() {
    if !possible("there_and_back_by_postcopy") {
        return;
    }
    let (mut world, mut here) = World::new();
    for turn in 0..3 {
        let there = world.host(&["--incoming"]);
        let address = listen(&world.authority, &there, ID, 20);
        let mut limits = limits(MigrationMode::Postcopy, 200);
        limits.streams = 1 + turn;
        send(&world.authority, &here, address, limits);
        let report = here.migrated().report.expect("the source has a report");
        arrived(&report);
        assert_eq!(report.mode, Mode::Postcopy);
        assert_eq!(there.migrated().error, None);
        world.healthy();
        assert_eq!(here.quit(), Some(0));
        here = there;
    }
    assert_eq!(here.quit(), Some(0));
}

#[test]
fn a_link_cut_in_postcopy_and_again_in_the_reconnect_loses_nothing() {
    if !possible("a_link_cut_in_postcopy_and_again_in_the_reconnect_loses_nothing") {
        return;
    }
    let (mut world, here) = World::new();
    let there = world.host(&["--incoming"]);
    let proxy = Proxy::start(listen(&world.authority, &there, ID, 60), None);
    send(&world.authority, &here, proxy.address(), limits(MigrationMode::Postcopy, 8));
    in_postcopy(&here);
    assert!(
        here.client.cancel_migration().is_err() && there.client.cancel_migration().is_err(),
        "cancelled after Commit"
    );
    proxy.sever(true);
    let words = |vmm: &Vmm| until("words", Duration::from_secs(30), || status(vmm).error);
    assert!(words(&here).contains("reconnecting"), "{:?}", status(&here));
    assert!(words(&there).contains("have not arrived"), "{:?}", status(&there));
    // Now the reconnect itself is cut, as soon as it has begun.
    let connections = proxy.connections();
    proxy.sever(false);
    until("a reconnect", Duration::from_secs(30), || (proxy.connections() > connections).then_some(()));
    proxy.sever(false);
    let report = here.migrated().report.expect("the source has a report");
    arrived(&report);
    assert!(report.postcopy.expect("post-copy totals").recoveries >= 1);
    assert_eq!(there.migrated().error, None);
    world.healthy();
    assert_eq!((here.quit(), there.quit()), (Some(0), Some(0)));
}

#[test]
fn a_source_killed_in_postcopy_is_a_loss_that_is_said() {
    if !possible("a_source_killed_in_postcopy_is_a_loss_that_is_said") {
        return;
    }
    let (mut world, mut here) = World::new();
    let there = world.host(&["--incoming"]);
    let address = listen(&world.authority, &there, ID, 2);
    send(&world.authority, &here, address, limits(MigrationMode::Postcopy, 8));
    in_postcopy(&here);
    here.child.kill().expect("it lives");
    let error = there.migrated().error.expect("words");
    assert!(error.contains("pages and") && error.contains("did not come back"), "{error}");
    let machine = there.client.machine().expect("an answer");
    assert_eq!(machine.state, MachineState::Stopped);
    assert!(there.client.resume().is_err(), "a machine without all of its memory must not run");
    drop(there);
}
