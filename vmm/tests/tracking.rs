//! The dirty log and the dirty rings under the bundled guest: both lose nothing, and what each costs.
//!
//! `cargo test -p vmm --test tracking -- --nocapture` prints what the guest's sweeper does per second without tracking and
//! while a migration is held in rounds of a second, and the downtime.

mod common;

use std::time::Duration;

use common::{Lab, Vmm, guest, listen, ready, sending, until};
use headroom_guest::{Client as Guest, Status};
use migration::policy::MigrationMode;
use migration::report::Outcome;
use migration::testing::Authority;
use vmm::api::Phase;
use vmm::config::{DirtyTracking, MigrationLimits, SendConfig};

/// Sweeps as fast as it can.
const WORKLOAD: &str = "ip=10.0.0.2/24 sweep=48:100000 disk=4:1 cpu=0 fill=16 hb=100";
const PATIENCE: Duration = Duration::from_secs(60);

fn status(guest: &mut Guest) -> Status {
    let status = until("the guest's answer", PATIENCE, || guest.status().ok());
    assert_eq!((status.sweep_errors, status.disk_errors, status.fill_errors), (0, 0, 0), "{status:?}");
    status
}

/// MiB per second that the sweeper writes, over about a second of the guest's own time.
fn rate(guest: &mut Guest) -> f64 {
    let before = status(guest);
    let after = until("a second of the guest", PATIENCE, || {
        Some(status(guest)).filter(|now| now.uptime_ms >= before.uptime_ms + 1000)
    });
    let pages = (after.sweep_pages_checked - before.sweep_pages_checked) as f64;
    pages / 256.0 / (after.uptime_ms - before.uptime_ms) as f64 * 1e3
}

/// Whether this host's KVM can be trusted with dirty rings.
fn fit() -> Result<(), String> {
    let host = vmm::kvm::Host::open().expect("KVM");
    match host.capabilities().dirty_ring {
        None => Err("this host's KVM has no dirty rings".into()),
        Some(_) => vmm::vcpu::ring_probe::stops_in_time(&host).map_err(|unfit| unfit.to_string()),
    }
}

struct Moved {
    free: f64,
    tracked: f64,
    downtime_ms: f64,
    pause_ms: f64,
}

/// Moves a machine, whose migration is held for some rounds, from one kind of tracking to the other.
fn moved(lab: &Lab, authority: &Authority, kind: &str, other: &str, number: u32) -> Moved {
    let machine = |index: u32, kind: &str, arguments: &[&str]| -> Vmm {
        let tap = format!("tap{number}{index}");
        lab.tap(&tap);
        let mut config = lab.config(128, WORKLOAD, &tap, &lab.disk(&format!("disk{number}{index}"), 16));
        (config["dirty_tracking"], config["vcpus"]) = (kind.into(), 2.into());
        lab.vmm(&format!("vmm{number}{index}"), &config, arguments)
    };
    let here = machine(0, kind, &[]);
    let mut guest = guest();
    until("a guest that is ready", PATIENCE, || guest.status().ok().filter(|status| status.ready));
    let free = rate(&mut guest);
    let there = machine(1, other, &["--incoming"]);
    let id = format!("m{number}");
    let address = listen(authority, &there, &id, 20);
    let limits = MigrationLimits {
        mode: MigrationMode::Precopy,
        downtime_ms: 2000,
        throttle_max_percent: 80,
        ..MigrationLimits::default()
    };
    let config = sending(authority, &id, address, limits);
    here.client.send(&SendConfig { pause_before_switchover: true, ..config }).expect("it starts");
    let progress = || here.client.migration().expect("an answer").expect("a migration");
    let waiting = until("readiness", PATIENCE, || {
        Some(progress()).filter(|status| status.waiting || status.phase == Phase::Ended)
    });
    assert!(waiting.waiting, "{waiting:?}");
    let tracked = rate(&mut guest);
    until("more rounds", PATIENCE, || Some(progress()).filter(|now| now.round >= waiting.round + 2));
    here.client.continue_migration().expect("it goes on");
    let report = here.migrated().report.expect("the source has a report");
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    let equal = (report.verification.memory_digest_ok, report.verification.disk_digest_ok);
    assert_eq!(equal, (Some(true), Some(true)), "{:?}", report.verification);
    there.migrated();
    let before = status(&mut guest);
    until("a whole sweep after the move", PATIENCE, || {
        Some(status(&mut guest)).filter(|now| now.sweep_pages_checked > before.sweep_pages_checked + 48 * 256)
    });
    drop(here);
    let downtime = &report.downtime_ms;
    Moved { free, tracked, downtime_ms: downtime.total, pause_ms: downtime.pause }
}

#[test]
fn a_machine_moves_between_hosts_with_any_tracking() {
    if !ready("a_machine_moves_between_hosts_with_any_tracking") {
        return;
    }
    let fit = fit();
    if let Err(reason) = &fit {
        eprintln!("dirty rings are not used: {reason}");
    }
    let authority = Authority::new();
    let lab = Lab::new();
    let pairs = if fit.is_ok() { &[("log", "ring"), ("ring", "log")][..] } else { &[("log", "auto")] };
    for (number, &(kind, other)) in (0..).zip(pairs) {
        let moved = moved(&lab, &authority, kind, other, number);
        eprintln!(
            "{kind}: sweeps {:.0} MiB/s, with tracking {:.0} MiB/s ({:.2}); downtime {:.1} ms, of it the pause {:.1} ms",
            moved.free,
            moved.tracked,
            moved.tracked / moved.free,
            moved.downtime_ms,
            moved.pause_ms,
        );
    }
}

/// Where entries would be lost, a ring is refused, and `auto` takes the log and says why; elsewhere both have rings.
#[test]
fn a_machine_gets_rings_only_where_none_of_their_entries_is_lost() {
    if !ready("a_machine_gets_rings_only_where_none_of_their_entries_is_lost") {
        return;
    }
    let lab = Lab::new();
    let machine = |number: u32, kind: &str, vcpus: u32| {
        let tap = format!("tap{number}");
        lab.tap(&tap);
        let mut config = lab.config(64, WORKLOAD, &tap, &lab.disk(&format!("disk{number}"), 16));
        (config["dirty_tracking"], config["vcpus"]) = (kind.into(), vcpus.into());
        config
    };
    let told = |number: u32, kind: &str, vcpus: u32| {
        let vmm = lab.vmm(&format!("vmm{number}"), &machine(number, kind, vcpus), &[]);
        let info = vmm.client.machine().expect("an answer");
        (info.dirty_tracking.expect("a machine"), info.dirty_tracking_reason)
    };
    assert_eq!(told(0, "log", 2), (DirtyTracking::Log, None));
    assert_eq!(told(1, "auto", 1), (DirtyTracking::Log, None), "of one vCPU it is known who dirties");
    match fit() {
        Ok(()) => {
            assert_eq!(told(2, "auto", 2), (DirtyTracking::Ring, None));
            assert_eq!(told(3, "ring", 1), (DirtyTracking::Ring, None));
        }
        Err(reason) => {
            // Where its numbers begin.
            let reason = reason.split('(').next().expect("the beginning");
            let (kind, why) = told(2, "auto", 2);
            assert!(kind == DirtyTracking::Log && why.as_ref().is_some_and(|why| why.starts_with(reason)), "{why:?}");
            let error = lab.refused(&machine(3, "ring", 1));
            assert!(error.contains(reason) && error.contains("use \"auto\" or \"log\""), "{error}");
        }
    }
}
