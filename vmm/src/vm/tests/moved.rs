//! Whole migrations, over TLS on the loopback, of machines whose written pages are recorded by rings.

use std::sync::Mutex;

use migration::policy::MigrationMode;
use migration::report::{Mode, Outcome, Report};
use migration::testing::Authority;

use super::dirty::{self, SWEEPER, tracked};
use super::sweeper::{KERNEL, Work, put_to_work, written};
use super::*;
use crate::config::{DirtyTracking, MigrationLimits, ReceiveConfig, SendConfig, TlsIdentity};
use crate::migrate::{Ended, Job};
use crate::vcpu::ring_probe;

/// Pages that are swept: 16 MiB of the 64.
const SWEPT: std::ops::Range<u64> = 0x400..0x1400;
const TOKEN: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

/// A machine with rings whose second vCPU writes all the time, and the first never.
fn busy() -> (tempfile::NamedTempFile, Machine) {
    let (file, machine) = tracked("ring", &KERNEL, 2, 64, u32::MAX);
    // What cannot be packed: the link is to be slow.
    let mut state = 1u64;
    for page in SWEPT {
        let noise: Vec<u8> = (0..PAGE_BYTES / 8 - 1)
            .flat_map(|_| {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                (state ^ (state >> 29)).to_le_bytes()
            })
            .collect();
        machine.memory().ram().write_slice(&noise, GuestAddress(page * PAGE_BYTES + 8)).unwrap();
    }
    put_to_work(&machine, &[Work::Spin, Work::Sweep(SWEPT, f64::INFINITY)]);
    (file, machine)
}

fn identity(authority: &Authority, host: &str) -> TlsIdentity {
    let identity = authority.issue(host);
    TlsIdentity { ca_pem: identity.ca_pem, certificate_pem: identity.certificate_pem, key_pem: identity.key_pem }
}

/// Moves a machine into another one of this process, which records by the log.
fn moved(machine: &Arc<Machine>, limits: MigrationLimits) -> (Report, Arc<Machine>) {
    let authority = Authority::new();
    let place = Arc::new(Mutex::new(None));
    let there = MachineConfig { dirty_tracking: DirtyTracking::Log, ..machine.config().clone() };
    let receiving = ReceiveConfig {
        id: "m1".into(),
        listen: "127.0.0.1:0".parse().unwrap(),
        token: TOKEN.into(),
        source_host: "a".into(),
        destination_host: "b".into(),
        tls: identity(&authority, "b"),
        deadline_s: 60,
        recover_s: 20,
        mark: None,
        reuse_disks: false,
    };
    let (arrival, address) = Job::receive(there, Arc::clone(&place), receiving).unwrap();
    let sending = SendConfig {
        id: "m1".into(),
        address,
        token: TOKEN.into(),
        source_host: "a".into(),
        destination_host: "b".into(),
        tls: identity(&authority, "a"),
        limits,
        pause_before_switchover: false,
        trigger: Default::default(),
    };
    let departure = Job::send(Arc::clone(machine), sending).unwrap();
    let ended = |job: &Job| {
        let start = Instant::now();
        loop {
            match job.ended() {
                Some(ended) => return ended,
                None if start.elapsed() > Duration::from_secs(90) => panic!("it lasts: {:?}", job.status()),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    };
    let Ended::Sent(report) = ended(&departure) else { panic!("it was sent from here") };
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    assert!(matches!(ended(&arrival), Ended::Received(_)));
    let machine = lock(&place).clone().expect("a machine");
    (*report, machine)
}

/// A sweep increments one page after the other, so that a page is at most one ahead of those behind it: a single lost write shows.
fn nothing_was_lost(machine: &Machine, swept: std::ops::Range<u64>) {
    let (last, arrived) = (swept.end - 1, written(machine, swept.end - 1));
    until("sweeps there", || written(machine, last) > arrived + 1);
    machine.pause().unwrap();
    let counts: Vec<u32> = swept.map(|page| written(machine, page)).collect();
    let (first, last) = (counts[0], counts[counts.len() - 1]);
    assert!(counts.is_sorted_by(|one, next| one >= next) && first - last <= 1, "{counts:?}");
    machine.resume().unwrap();
}

#[test]
fn a_machine_with_rings_moves_whole() {
    let Some(host) = host_for_test("a_machine_with_rings_moves_whole") else { return };
    if host.capabilities().dirty_ring.is_none() {
        eprintln!("skipped a_machine_with_rings_moves_whole: this host's KVM has none");
        return;
    }
    let _turn = turn();
    let (slow, hold) = (16 << 20, 99);
    let free = MigrationLimits { downtime_ms: 2000, compare_full: true, ..MigrationLimits::default() };
    let throttled = MigrationLimits {
        mode: MigrationMode::Precopy,
        bandwidth_bytes_per_second: Some(slow),
        throttle_max_percent: hold,
        ..MigrationLimits::default()
    };
    let hybrid = MigrationLimits { throttle_max_percent: 0, mode: MigrationMode::Hybrid, ..throttled.clone() };
    for (limits, mode) in [(free, Mode::Precopy), (throttled, Mode::Precopy), (hybrid, Mode::Hybrid)] {
        let (_file, machine) = busy();
        let machine = Arc::new(machine);
        machine.resume().unwrap();
        until("a sweep", || written(&machine, SWEPT.end - 1) > 0);
        let (report, there) = moved(&machine, limits.clone());
        let (rounds, held) = (report.rounds.len(), machine.held());
        eprintln!(
            "{mode:?}: {rounds} rounds, {:.0} ms, down {:.1} ms, held {held:?}",
            report.total_ms, report.downtime_ms.total
        );
        assert_eq!(
            (report.mode, report.verification.memory_digest_ok),
            (mode, Some(true)),
            "{:?}",
            report.verification
        );
        assert_eq!(report.warnings, Vec::<String>::new());
        assert!(held[0].is_zero(), "it writes nothing: {held:?}");
        assert_eq!(limits.throttle_max_percent > 0, !held[1].is_zero(), "{held:?}");
        nothing_was_lost(&there, SWEPT);
    }
}

/// Where entries are lost, every round is of all pages: no round can be the last one, and the report says why.
#[test]
fn a_machine_whose_rings_overflow_moves_by_post_copy() {
    let Some(host) = host_for_test("a_machine_whose_rings_overflow_moves_by_post_copy") else { return };
    let _turn = turn();
    let unfit = host.capabilities().dirty_ring.and_then(|_| ring_probe::stops_in_time(&host).err());
    if unfit.is_none() {
        eprintln!("skipped a_machine_whose_rings_overflow_moves_by_post_copy: this host's KVM loses none");
        return;
    }
    let (_file, machine) = tracked("ring", &SWEEPER, 1, 64, 1 << 12);
    let machine = Arc::new(machine);
    machine.resume().unwrap();
    let swept = dirty::SWEPT;
    until("sweeps", || written(&machine, swept.end - 1) > 2);
    let limits =
        MigrationLimits { downtime_ms: 1, bandwidth_bytes_per_second: Some(1 << 20), ..MigrationLimits::default() };
    let (report, there) = moved(&machine, limits);
    eprintln!("{} rounds, {:.0} ms, down {:.1} ms", report.rounds.len(), report.total_ms, report.downtime_ms.total);
    assert_eq!((report.mode, report.verification.memory_digest_ok), (Mode::Hybrid, Some(true)));
    assert!(matches!(&report.warnings[..], [warning] if warning.contains("dirty_tracking")), "{:?}", report.warnings);
    nothing_was_lost(&there, swept);
}
