//! Memory that a real guest gives back: it leaves the host, a migration does not carry it, and nothing that is in use is lost.
//!
//! The guest is the bundled one; a small Linux, whose driver nobody here has written, is in `linux_balloon.rs`.

mod common;

use std::time::Duration;

use common::{Lab, Vmm, guest, listen, ready, sending, until};
use headroom_guest::{Client as Guest, Settings, Status};
use migration::policy::MigrationMode;
use migration::report::{Mode, Outcome, Report};
use migration::testing::Authority;
use serde_json::{Value, json};
use vmm::config::MigrationLimits;

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// What the guest has besides what it was told to fill: image, heap, rings, tables; and huge pages at the edges.
const SLACK: u64 = 48 * MIB;

struct World {
    lab: Lab,
    guest: Guest,
    memory_mib: u64,
    workload: String,
    balloon: Value,
    made: u32,
}

impl World {
    fn new(memory_mib: u64, workload: &str, balloon: Value) -> (Self, Vmm) {
        let workload = format!("ip=10.0.0.2/24 hb=100 {workload}");
        let mut world = Self { lab: Lab::new(), guest: guest(), memory_mib, workload, balloon, made: 0 };
        let here = world.host(&[]);
        until("the guest to be ready", PATIENCE, || world.guest.status().ok().filter(|now| now.ready));
        (world, here)
    }

    fn host(&mut self, arguments: &[&str]) -> Vmm {
        self.made += 1;
        let (tap, name) = (format!("tap{}", self.made), format!("vmm{}", self.made));
        self.lab.tap(&tap);
        let disk = self.lab.disk(&format!("disk{}", self.made), 16);
        let mut config = self.lab.config(self.memory_mib, &self.workload, &tap, &disk);
        config["balloon"] = self.balloon.clone();
        self.lab.vmm(&name, &config, arguments)
    }

    fn set(&mut self, settings: &Settings) {
        until("the guest to take settings", PATIENCE, || self.guest.set(settings.clone()).ok());
    }

    fn wait(&mut self, what: &str, wanted: impl Fn(&Status) -> bool) -> Status {
        until(what, PATIENCE, || self.guest.status().ok().filter(&wanted))
    }

    /// Reads back all that is filled, and some of what comes and goes, and finds it as it was.
    fn healthy(&mut self) {
        let since = self.wait("an answer", |_| true);
        self.set(&Settings { verify_fill: true, ..Settings::default() });
        let wanted = since.fill_pages_checked + since.fill_pages;
        let churned = since.churn_pages_checked + if since.workload.churn_mib > 0 { 64 * 256 } else { 0 };
        let swept = since.sweep_pages_checked + u64::from(since.workload.sweep_mib) * 256;
        let now = self.wait("the guest to look at everything", |now| {
            now.fill_pages_checked >= wanted && now.churn_pages_checked >= churned && now.sweep_pages_checked >= swept
        });
        assert_eq!((now.fill_errors, now.churn_errors, now.sweep_errors), (0, 0, 0), "{now:?}");
    }
}

fn resident(vmm: &Vmm) -> u64 {
    vmm.client.metrics().expect("an answer").memory_resident_bytes
}

fn wait_resident(what: &str, vmm: &Vmm, wanted: impl Fn(u64) -> bool) {
    until(what, PATIENCE, || Some(resident(vmm)).filter(|&bytes| wanted(bytes)));
}

fn migrate(from: &Vmm, to: &Vmm, limits: MigrationLimits) -> Report {
    let authority = Authority::new();
    let address = listen(&authority, to, "m1", 20);
    from.client.send(&sending(&authority, "m1", address, limits)).expect("it starts");
    let report = from.migrated().report.expect("the source has a report");
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    assert_eq!(report.verification.memory_digest_ok, Some(true), "{:?} {}", report.verification, report.reason);
    assert_eq!(to.migrated().error, None);
    report
}

fn fill(mib: u32) -> Settings {
    Settings { fill_mib: Some(mib), ..Settings::default() }
}

#[test]
fn memory_that_becomes_free_leaves_the_host() {
    if !ready("memory_that_becomes_free_leaves_the_host") {
        return;
    }
    let (mut world, vmm) = World::new(320, "fill=256", json!({}));
    wait_resident("256 MiB to be filled", &vmm, |bytes| bytes >= 256 * MIB);
    world.set(&fill(64));
    wait_resident("192 MiB to be given back", &vmm, |bytes| bytes <= 64 * MIB + SLACK);
    let info = vmm.client.balloon().expect("a balloon");
    assert_eq!((info.reported_bytes, info.inflated_bytes, info.actual_bytes), (192 * MIB, 0, 0));
    // And used again.
    world.set(&fill(200));
    world.wait("200 MiB", |now| now.fill_pages == 200 * 256);
    world.healthy();
    assert!(resident(&vmm) >= 200 * MIB);
    assert_eq!(vmm.quit(), Some(0));
}

#[test]
fn a_balloon_grows_and_shrinks() {
    if !ready("a_balloon_grows_and_shrinks") {
        return;
    }
    let (mut world, vmm) = World::new(320, "fill=256 sweep=8:32", json!({"free_page_reporting": false}));
    world.set(&fill(64));
    // Nobody has asked for what is free now.
    world.wait("freedom", |now| now.free_mib >= 192);
    wait_resident("all to be there still", &vmm, |bytes| bytes >= 256 * MIB);
    vmm.client.inflate(200).expect("a balloon");
    until("200 MiB in the balloon", PATIENCE, || {
        Some(vmm.client.balloon().expect("a balloon")).filter(|info| info.actual_bytes == 200 * MIB)
    });
    wait_resident("it to leave the host", &vmm, |bytes| bytes <= 120 * MIB + SLACK);
    let status = world.wait("the guest to know", |now| now.balloon_mib == 200);
    let told = until("the guest's figures", PATIENCE, || {
        let figures = vmm.client.balloon().expect("a balloon").statistics;
        figures.free_bytes.filter(|&bytes| bytes <= (u64::from(status.free_mib) + 1) * MIB).and(figures.total_bytes)
    });
    assert!(told <= 320 * MIB, "{told}");
    // More than the guest can spare, and then nothing.
    vmm.client.inflate(310).expect("a balloon");
    let full = world.wait("all that is free to be in it", |now| now.free_mib == 0);
    assert!((200..310).contains(&full.balloon_mib), "{full:?}");
    assert_eq!(vmm.client.inflate(320).expect_err("all of it").status(), Some(422));
    vmm.client.inflate(0).expect("a balloon");
    until("an empty balloon", PATIENCE, || {
        Some(vmm.client.balloon().expect("a balloon")).filter(|info| info.actual_bytes == 0)
    });
    world.set(&fill(240));
    world.wait("240 MiB", |now| now.fill_pages == 240 * 256);
    world.healthy();
    assert_eq!(vmm.quit(), Some(0));
}

#[test]
fn a_migration_carries_only_what_is_in_use() {
    if !ready("a_migration_carries_only_what_is_in_use") {
        return;
    }
    let (mut world, here) = World::new(640, "fill=512", json!({}));
    world.set(&fill(256));
    world.wait("all that is free to be given back", |now| now.free_mib > 256 && now.given_mib == now.free_mib);
    let there = world.host(&["--incoming"]);
    let report = migrate(&here, &there, MigrationLimits::default());
    let bytes = report.memory.bytes_sent;
    assert!((256 * MIB..256 * MIB + SLACK).contains(&bytes), "{} MiB were sent", bytes >> 20);
    world.healthy();
    assert!(resident(&there) <= 256 * MIB + SLACK, "{} MiB", resident(&there) >> 20);
    // The balloon has moved too.
    there.client.inflate(100).expect("a balloon");
    world.wait("the balloon to grow", |now| now.balloon_mib == 100);
    assert_eq!(there.client.balloon().expect("a balloon").actual_bytes, 100 * MIB);
    assert_eq!((here.quit(), there.quit()), (Some(0), Some(0)));
}

#[test]
fn a_migration_leaves_out_what_the_guest_names_as_free() {
    if !ready("a_migration_leaves_out_what_the_guest_names_as_free") {
        return;
    }
    let (mut world, here) = World::new(640, "fill=512", json!({"free_page_reporting": false}));
    world.set(&fill(256));
    world.wait("freedom", |now| now.free_mib > 256);
    wait_resident("all to be there still", &here, |bytes| bytes >= 512 * MIB);
    let there = world.host(&["--incoming"]);
    // Slow, so that what is sent before the guest has answered is little on a busy host too.
    let limits = MigrationLimits { bandwidth_bytes_per_second: Some(160 * MIB), ..MigrationLimits::default() };
    let report = migrate(&here, &there, limits);
    let bytes = report.memory.bytes_sent;
    assert!((256 * MIB..256 * MIB + SLACK).contains(&bytes), "{} MiB were sent", bytes >> 20);
    let hinted = here.client.balloon().expect("a balloon").hinted_bytes;
    assert!(hinted >= 256 * MIB, "{} MiB were named", hinted >> 20);
    assert!(resident(&there) <= 256 * MIB + SLACK, "{} MiB", resident(&there) >> 20);
    world.healthy();
    // It has its memory back, and can use it.
    world.set(&fill(560));
    world.wait("560 MiB", |now| now.fill_pages == 560 * 256);
    world.healthy();
    assert_eq!((here.quit(), there.quit()), (Some(0), Some(0)));
}

/// Memory comes and goes all the time: while it is sent, while the machine is handed over, and while it arrives.
fn churn(balloon: Value, mode: MigrationMode, mib_per_second: u64) -> Option<Report> {
    if mode != MigrationMode::Precopy
        && let Err(error) = vmm::memory::uffd::check()
    {
        eprintln!("skipped: {error}");
        return None;
    }
    let (mut world, mut here) = World::new(192, "fill=32 sweep=16:64 churn=48:96", balloon);
    world.wait("some churning", |now| now.churn_pages_checked > 16 * 256);
    let mut last = None;
    for _ in 0..3 {
        let there = world.host(&["--incoming"]);
        let bandwidth_bytes_per_second = Some(mib_per_second * MIB);
        let limits = MigrationLimits { mode, bandwidth_bytes_per_second, streams: 2, ..MigrationLimits::default() };
        last = Some(migrate(&here, &there, limits));
        world.healthy();
        assert_eq!(here.quit(), Some(0));
        here = there;
    }
    assert_eq!(here.quit(), Some(0));
    last
}

#[test]
fn nothing_is_lost_while_memory_comes_and_goes_in_precopy() {
    if ready("nothing_is_lost_while_memory_comes_and_goes_in_precopy") {
        churn(json!({}), MigrationMode::Precopy, 400);
        churn(json!({"free_page_reporting": false}), MigrationMode::Precopy, 400);
    }
}

#[test]
fn nothing_is_lost_while_memory_comes_and_goes_in_postcopy() {
    if ready("nothing_is_lost_while_memory_comes_and_goes_in_postcopy")
        && let Some(report) = churn(json!({}), MigrationMode::Postcopy, 48)
    {
        assert_eq!(report.mode, Mode::Postcopy);
    }
}
