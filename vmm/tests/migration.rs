//! Real machines that move between two VMM processes, with the guest's own oracles as judges.

mod common;

use std::time::{Duration, Instant};

use common::{Lab, Vmm, guest, listen, ready, sending, until};
use headroom_guest::Status;
use migration::report::{Outcome, Report};
use migration::testing::Authority;
use vmm::api::{ChangedLimits, DiskSize, MachineState, Phase};
use vmm::config::{MigrationLimits, SendConfig};

const WORKLOAD: &str = "ip=10.0.0.2/24 sweep=16:100 disk=8:8 cpu=5 fill=64 hb=100";

fn healthy(status: &Status) {
    assert_eq!((status.sweep_errors, status.disk_errors), (0, 0), "{status:?}");
}

fn migrate(authority: &Authority, from: &Vmm, to: &Vmm, id: &str) -> Report {
    start(authority, from, to, id, false);
    let report = from.migrated().report.expect("the source has a report");
    // The destination hears of the end a moment later, and until then it takes no further migration.
    to.migrated();
    assert_eq!(std::fs::read(to.mark()).expect("a mark"), b"ran\n");
    report
}

fn start(authority: &Authority, from: &Vmm, to: &Vmm, id: &str, pause_before_switchover: bool) {
    let address = listen(authority, to, id, 20);
    let config = sending(authority, id, address, MigrationLimits::default());
    from.client.send(&SendConfig { pause_before_switchover, ..config }).expect("it starts");
}

#[test]
fn it_waits_before_the_switchover_and_takes_other_limits_meanwhile() {
    if !ready("it_waits_before_the_switchover_and_takes_other_limits_meanwhile") {
        return;
    }
    let lab = Lab::new();
    let authority = Authority::new();
    for tap in ["tap0", "tap1"] {
        lab.tap(tap);
    }
    let here = lab.vmm("vmm0", &lab.config(160, WORKLOAD, "tap0", &lab.disk("disk0", 16)), &[]);
    let there = lab.vmm("vmm1", &lab.config(160, WORKLOAD, "tap1", &lab.disk("disk1", 16)), &["--incoming"]);
    let mut guest = guest();
    let before = until("the guest's answer", Duration::from_secs(60), || guest.status().ok());
    let refused = here.client.change_limits(&ChangedLimits::default()).unwrap_err();
    assert_eq!(refused.status(), Some(404), "{refused}");
    start(&authority, &here, &there, "m1", true);
    let status = || here.client.migration().expect("an answer").expect("a migration");
    let ready = until("readiness", Duration::from_secs(60), || Some(status()).filter(|status| status.waiting));
    assert_eq!((ready.phase, ready.bandwidth_bytes_per_second), (Phase::Precopy, None));
    let bandwidth_bytes_per_second = Some(Some(64 << 20));
    let limits = ChangedLimits { bandwidth_bytes_per_second, downtime_ms: Some(80), throttle_max_percent: Some(30) };
    assert_eq!(here.client.change_limits(&limits).expect("taken").bandwidth_bytes_per_second, Some(64 << 20));
    for (downtime_ms, throttle_max_percent) in [(Some(0), None), (None, Some(100))] {
        let wrong = ChangedLimits { bandwidth_bytes_per_second: Some(None), downtime_ms, throttle_max_percent };
        assert_eq!(here.client.change_limits(&wrong).unwrap_err().status(), Some(422));
    }
    assert_eq!(status().bandwidth_bytes_per_second, Some(64 << 20), "all or nothing");
    let larger = |bytes| here.client.resize_disk(&DiskSize { id: "disk0".into(), bytes });
    let refused = larger(32 << 20).unwrap_err();
    assert_eq!(refused.status(), Some(409), "{refused}");
    assert!(refused.to_string().contains("cancel it"), "{refused}");
    until("more rounds", Duration::from_secs(20), || Some(status()).filter(|now| now.round >= ready.round + 2));
    until("the guest, which runs meanwhile", Duration::from_secs(20), || {
        guest.status().ok().filter(|now| now.sweep_step > before.sweep_step)
    });
    assert_eq!(
        (here.state(), there.client.continue_migration().unwrap_err().status()),
        (MachineState::Running, Some(409))
    );
    here.client.continue_migration().expect("it goes on");
    let report = here.migrated().report.expect("the source has a report");
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    assert_eq!(report.verification.memory_digest_ok, Some(true), "{:?}", report.verification);
    assert_eq!(here.client.continue_migration().unwrap_err().status(), Some(409), "it is over");
    there.migrated();
}

#[test]
fn a_busy_guest_moves_there_and_back() {
    if !ready("a_busy_guest_moves_there_and_back") {
        return;
    }
    let lab = Lab::new();
    let authority = Authority::new();
    lab.tap("tap0");
    let disk = lab.disk("disk0", 16);
    let mut here = lab.vmm("vmm0", &lab.config(160, WORKLOAD, "tap0", &disk), &[]);
    let mut guest = guest();
    let before = until("the guest's answer", Duration::from_secs(60), || guest.status().ok());
    healthy(&before);
    let clock = Instant::now();
    let (mut last, mut since) = (before, 0);
    for round in 1..=4 {
        let tap = format!("tap{round}");
        lab.tap(&tap);
        let disk = lab.disk(&format!("disk{round}"), 16);
        let config = lab.config(160, WORKLOAD, &tap, &disk);
        let there = lab.vmm(&format!("vmm{round}"), &config, &["--incoming"]);
        assert_eq!(there.state(), MachineState::Incoming);
        let report = migrate(&authority, &here, &there, &format!("m{round}"));
        assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
        assert_eq!((here.state(), there.state()), (MachineState::Fenced, MachineState::Running));
        assert_eq!(report.verification.memory_digest_ok, Some(true), "{:?}", report.verification);
        assert_eq!(report.verification.disk_digest_ok, Some(true), "{:?}", report.verification);
        eprintln!("downtime {:?} total {:.0} ms, {} rounds", report.downtime_ms, report.total_ms, report.rounds.len());
        assert!(here.client.resume().is_err(), "a fenced machine must not run");
        assert_eq!(here.quit(), Some(0));
        here = there;
        let status = until("the guest's answer after the move", Duration::from_secs(20), || {
            guest
                .status()
                .ok()
                .filter(|status| status.sweep_step > last.sweep_step && status.disk_sequence > last.disk_sequence)
        });
        healthy(&status);
        let asked = clock.elapsed().as_millis() as u64;
        let (passed, guest_passed) = (asked - since, status.uptime_ms.checked_sub(last.uptime_ms));
        let guest_passed = guest_passed.expect("guest time must not go back");
        // Guest time is the TSC: what it gains over this clock is the length of a request and what a calibration is off.
        assert!(guest_passed <= passed + passed / 50 + 100, "guest time jumped: {guest_passed} of {passed} ms");
        assert!(guest_passed + 500 + passed / 50 >= passed, "guest time stood still: {guest_passed} of {passed} ms");
        (last, since) = (status, asked);
    }
    assert_eq!(here.quit(), Some(0));
}
