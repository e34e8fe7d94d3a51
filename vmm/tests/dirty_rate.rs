//! The dirty rate of a real guest, estimated without a migration, beside one, and one after the other.

mod common;

use std::time::{Duration, Instant};

use common::{Lab, Vmm, guest, listen, ready, sending, until};
use headroom_guest::{Client as Guest, Settings, Status};
use migration::policy::MigrationMode;
use migration::report::Outcome;
use migration::testing::Authority;
use vmm::api::client::ClientError;
use vmm::api::{DirtyRate, DirtyRateRequest, DirtyRateSource, Phase};
use vmm::config::{MigrationLimits, SendConfig};

const MIB: f64 = 1048576.0;
const PATIENCE: Duration = Duration::from_secs(60);
/// Memory that the guest sweeps.
const SET_MIB: u32 = 64;

fn machine(lab: &Lab, number: u32, arguments: &[&str]) -> Vmm {
    let tap = format!("tap{number}");
    lab.tap(&tap);
    let workload = format!("ip=10.0.0.2/24 hb=100 fill=16 sweep={SET_MIB}:0");
    let mut config = lab.config(192, &workload, &tap, &lab.disk(&format!("disk{number}"), 16));
    config["vcpus"] = 1.into();
    lab.vmm(&format!("vmm{number}"), &config, arguments)
}

fn status(guest: &mut Guest) -> Status {
    until("the guest's answer", PATIENCE, || guest.status().ok())
}

fn sweep(guest: &mut Guest, mib_per_second: u32) {
    let settings = Settings { sweep_mib_per_second: Some(mib_per_second), ..Settings::default() };
    until("the guest to take settings", PATIENCE, || guest.set(settings.clone()).ok());
    let before = status(guest).sweep_pages_checked;
    let enough = u64::from(mib_per_second) * 64;
    until("the guest to sweep", PATIENCE, || (status(guest).sweep_pages_checked >= before + enough).then_some(()));
}

fn ask(vmm: &Vmm, interval_ms: u64) -> DirtyRate {
    vmm.client.dirty_rate(&DirtyRateRequest { interval_ms }).expect("an answer")
}

/// Asks, if need be again while another estimate is under way.
fn ask_in_turn(vmm: &Vmm, interval_ms: u64) -> Result<DirtyRate, ClientError> {
    until("its turn", PATIENCE, || {
        let answer = vmm.client.dirty_rate(&DirtyRateRequest { interval_ms });
        let taken = answer.as_ref().is_err_and(|error| error.status() == Some(409));
        (!taken).then_some(answer)
    })
}

/// Waits until somebody else has an estimate made: then this one is refused.
fn refused(vmm: &Vmm) -> ClientError {
    until("a refusal", PATIENCE, || vmm.client.dirty_rate(&DirtyRateRequest { interval_ms: 100 }).err())
}

/// An estimate, and what the guest has swept meanwhile by its own count, both in MiB per second.
fn beside(vmm: &Vmm, guest: &mut Guest, interval_ms: u64) -> (DirtyRate, f64) {
    let (before, start) = (status(guest), Instant::now());
    let rate = ask(vmm, interval_ms);
    let after = status(guest);
    let pages = (after.sweep_pages_checked - before.sweep_pages_checked) as f64;
    (rate, pages / 256.0 / start.elapsed().as_secs_f64())
}

#[test]
fn an_estimate_agrees_with_what_the_guest_does() {
    if !ready("an_estimate_agrees_with_what_the_guest_does") {
        return;
    }
    let lab = Lab::new();
    let vmm = machine(&lab, 0, &[]);
    let mut guest = guest();
    until("a guest that is ready", PATIENCE, || guest.status().ok().filter(|status| status.ready));
    let resident = || vmm.client.metrics().expect("an answer").memory_resident_bytes;
    // Slower than the set is swept once in the interval: every write hits another page.
    sweep(&mut guest, 20);
    let before = resident();
    let (rate, real) = beside(&vmm, &mut guest, 1000);
    eprintln!("the guest sweeps {real:.1} MiB/s: {rate:?}");
    assert_eq!((rate.source, rate.lower_bound), (DirtyRateSource::Sampled, false));
    let [low, high] =
        [rate.low_bytes_per_second, rate.high_bytes_per_second].map(|value| value.expect("a bound") / MIB);
    // The interval of 95 % is about a tenth to each side. The guest's count is over a somewhat longer time, in which it may have
    // had more or less of the processor: another tenth. Its stack, its rings and its heartbeat are less than 2 MiB.
    assert!(low * 0.85 - 2.0 <= real && real <= high * 1.15, "{low:.1} to {high:.1} MiB/s, and really {real:.1}");
    assert!(rate.sampled_pages >= 2048 && rate.resident_pages <= rate.sampled_pages, "{rate:?}");
    assert!(resident() <= before + (1 << 20), "an estimate takes no memory of the guest's");
    // Several times in the interval: the working set is seen, and that it is written faster than it is large.
    sweep(&mut guest, 400);
    let (rate, real) = beside(&vmm, &mut guest, 2000);
    eprintln!("the guest sweeps {real:.1} MiB/s: {rate:?}");
    let set = rate.working_set_bytes.expect("a working set") / MIB;
    assert!((0.85..1.15).contains(&(set / f64::from(SET_MIB))), "{set:.1} MiB");
    assert!(rate.peak_bytes_per_second.expect("a peak") > rate.bytes_per_second.expect("a rate") * 2.0, "{rate:?}");
    // Too many, too short, and of a machine that stands.
    std::thread::scope(|scope| {
        let first = scope.spawn(|| ask_in_turn(&vmm, 2000));
        let second = refused(&vmm);
        assert_eq!(second.status(), Some(409), "{second}");
        assert_eq!(first.join().expect("no panic").expect("an answer").source, DirtyRateSource::Sampled);
    });
    for interval_ms in [0, 99, 10_001] {
        let error = vmm.client.dirty_rate(&DirtyRateRequest { interval_ms }).expect_err("out of range");
        assert_eq!(error.status(), Some(422));
    }
    vmm.client.pause().expect("it pauses");
    let standing = ask(&vmm, 10_000);
    assert_eq!((standing.source, standing.bytes_per_second), (DirtyRateSource::Stopped, Some(0.0)));
    vmm.client.resume().expect("it runs");
    // It goes at once, whatever is being looked at.
    std::thread::scope(|scope| {
        let long = scope.spawn(|| ask_in_turn(&vmm, 10_000));
        refused(&vmm);
        let start = Instant::now();
        vmm.client.quit().expect("an answer");
        assert!(long.join().expect("no panic").is_err(), "the process has gone");
        assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    });
}

#[test]
fn an_estimate_and_a_migration_leave_each_other_alone() {
    if !ready("an_estimate_and_a_migration_leave_each_other_alone") {
        return;
    }
    let (lab, authority) = (Lab::new(), Authority::new());
    let here = machine(&lab, 0, &[]);
    let mut guest = guest();
    until("a guest that is ready", PATIENCE, || guest.status().ok().filter(|status| status.ready));
    sweep(&mut guest, 20);
    let there = machine(&lab, 1, &["--incoming"]);
    assert_eq!(
        there.client.dirty_rate(&DirtyRateRequest::default()).expect_err("nothing is there").status(),
        Some(409)
    );
    let address = listen(&authority, &there, "m1", 20);
    let limits = MigrationLimits { mode: MigrationMode::Precopy, downtime_ms: 1000, ..MigrationLimits::default() };
    let config = sending(&authority, "m1", address, limits);
    let migration = || here.client.migration().expect("an answer").expect("a migration");
    std::thread::scope(|scope| {
        let start = Instant::now();
        let estimate = scope.spawn(|| ask_in_turn(&here, 10_000));
        refused(&here);
        here.client.send(&SendConfig { pause_before_switchover: true, ..config }).expect("it starts, whoever looks");
        let rate = estimate.join().expect("no panic").expect("an answer");
        assert_eq!((rate.source, rate.sampled_pages), (DirtyRateSource::Migration, 0), "{rate:?}");
        assert!(start.elapsed() < Duration::from_secs(8), "it has not looked on: {:?}", start.elapsed());
    });
    until("rounds", PATIENCE, || Some(migration()).filter(|now| now.waiting && now.round >= 2));
    let start = Instant::now();
    let rate = ask(&here, 10_000);
    eprintln!("by the migration: {rate:?}");
    assert!(start.elapsed() < Duration::from_secs(8), "nothing is looked at: {:?}", start.elapsed());
    assert_eq!((rate.source, rate.sampled_pages), (DirtyRateSource::Migration, 0));
    let measured = rate.bytes_per_second.expect("a rate") / MIB;
    assert!((5.0..80.0).contains(&measured), "the guest sweeps 20 MiB/s: {measured}");
    let arriving = there.client.dirty_rate(&DirtyRateRequest::default()).expect("an answer");
    assert_eq!((arriving.source, arriving.bytes_per_second), (DirtyRateSource::Migration, None));
    here.client.continue_migration().expect("it goes on");
    let report = here.migrated().report.expect("the source has a report");
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    let equal = (report.verification.memory_digest_ok, report.verification.disk_digest_ok);
    assert_eq!(equal, (Some(true), Some(true)), "{:?}", report.verification);
    assert_eq!(there.migrated().phase, Phase::Ended);
    // Where it is now it can be asked again, and where it was nothing runs.
    assert_eq!(ask(&there, 200).source, DirtyRateSource::Sampled);
    assert_eq!(ask(&here, 200).source, DirtyRateSource::Stopped);
    let now = status(&mut guest);
    assert_eq!((now.sweep_errors, now.fill_errors, now.disk_errors), (0, 0, 0));
}
