//! vCPUs are held so that pre-copy converges, and never for longer than the migration.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use migration::control::{Control, Phase};
use migration::guest::GuestError;
use migration::policy::MigrationMode;
use migration::report::{Mode, Outcome, Report};
use migration::testing::{FakeMachine, Owner, Pair, Proxy, Workload, machines, settle};

const PATIENCE: Duration = Duration::from_secs(30);

/// Writes up to 40 MiB/s into 3 MiB, over a link of 5 MiB/s (twice that, since its pages can be compressed) in a downtime of at
/// most 60 ms, which is some hundred KiB.
fn storm() -> Workload {
    Workload {
        filled_pages: 200,
        sweep_pages: 800,
        pages_per_ms: 10,
        sweep_blocks: 0,
        blocks_per_16_pages: 0,
        ..Workload::default()
    }
}

fn pair(mode: MigrationMode, throttle_max_percent: u8) -> Pair {
    let mut pair = Pair::new();
    let limits = &mut pair.source_options.limits;
    limits.mode = mode;
    limits.throttle_max_percent = throttle_max_percent;
    limits.timeout = PATIENCE;
    limits.downtime = Duration::from_millis(60);
    limits.bandwidth_bytes_per_second = Some(5 << 20);
    pair
}

/// Runs it to its end and checks who has the machine.
fn moved(pair: Pair, adjust: impl FnOnce(&Arc<FakeMachine>, &FakeMachine)) -> (Report, Owner, u8) {
    let (world, source, destination) = machines(4096, &[]);
    source.boot(storm());
    adjust(&source, &destination);
    let (report, received) = pair.run(&source, &destination);
    let owner = settle(&world, &source, &destination, &report, &received).unwrap_or_else(|error| panic!("{error}"));
    (report, owner, source.throttle_percent().1)
}

/// Lets a migration that is held go on when it is dropped.
struct Release(Control);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.release();
    }
}

fn wait_throttled(control: &Control) {
    let deadline = Instant::now() + PATIENCE;
    while control.status().throttle_percent == 0 {
        assert!(Instant::now() < deadline && control.status().phase != Phase::Ended, "{:?}", control.status());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_guest_that_does_not_converge_is_held_until_it_does() {
    let (report, owner, most) = moved(pair(MigrationMode::Precopy, 99), |_, _| ());
    assert_eq!((report.outcome, owner), (Outcome::Completed, Owner::Destination), "{}", report.reason);
    assert_eq!(report.mode, Mode::Precopy);
    assert!(report.downtime_ms.total < 1000.0, "{report:?}");
    let [held] = &report.throttled[..] else { panic!("one vCPU was held: {report:?}") };
    assert_eq!((held.vcpu, held.percent_max, report.throttle_percent_max), (0, most, most));
    assert!((10..=99).contains(&most) && held.held_ms > 1.0, "{held:?}");
}

#[test]
fn nobody_is_held_without_the_operators_leave() {
    let (report, owner, most) = moved(pair(MigrationMode::Precopy, 0), |_, _| ());
    assert_eq!((report.outcome, owner, most), (Outcome::Failed, Owner::Source, 0));
    assert!(report.reason.contains("throttling of its vCPUs") && report.throttled.is_empty(), "{}", report.reason);
}

/// A tenth less is not enough: it is tried, and then the next thing that is allowed follows.
#[test]
fn too_little_leave_ends_as_without() {
    let (report, owner, most) = moved(pair(MigrationMode::Precopy, 10), |_, _| ());
    assert_eq!((report.outcome, owner, most), (Outcome::Failed, Owner::Source, 10), "{}", report.reason);
    assert!(report.reason.contains("held for up to 10 %"), "{}", report.reason);
    let (report, owner, most) = moved(pair(MigrationMode::Hybrid, 10), |_, destination| {
        destination.offers_postcopy.store(true, Ordering::SeqCst);
    });
    assert_eq!((report.outcome, owner, most), (Outcome::Completed, Owner::Destination, 10), "{}", report.reason);
    assert_eq!((report.mode, report.throttle_percent_max), (Mode::Hybrid, 10));
}

#[test]
fn a_cancel_releases_it() {
    let pair = pair(MigrationMode::Precopy, 40);
    let control = pair.source_control.clone();
    let steering = std::thread::spawn(move || {
        wait_throttled(&control);
        control.cancel().expect("before Commit");
    });
    let (report, owner, most) = moved(pair, |_, _| ());
    steering.join().expect("the steering thread");
    assert_eq!((report.outcome, owner, most), (Outcome::Cancelled, Owner::Source, 40), "{}", report.reason);
    assert!(report.throttled[0].held_ms > 0.0 || report.rounds.len() < 4, "{report:?}");
}

#[test]
fn a_lost_link_releases_it() {
    let mut pair = pair(MigrationMode::Precopy, 40);
    let proxy = Proxy::start(pair.address(), None);
    pair.source_options.address = proxy.address();
    let control = pair.source_control.clone();
    let steering = std::thread::spawn(move || {
        wait_throttled(&control);
        proxy.cut_now();
    });
    let (report, owner, most) = moved(pair, |_, _| ());
    steering.join().expect("the steering thread");
    assert_eq!((report.outcome, owner, most), (Outcome::Failed, Owner::Source, 40), "{}", report.reason);
    assert!(report.transient, "{}", report.reason);
}

/// Each call fails once after vCPUs were held, throttling itself too; `settle` finds none held.
#[test]
fn a_failure_releases_it() {
    for method in ["throttle", "collect_dirty", "read_pages", "pause", "save_state", "fence"] {
        let (report, owner, most) = moved(pair(MigrationMode::Precopy, 99), |source, _| {
            let machine = Arc::downgrade(source);
            source.faults.on(method, move |_| match machine.upgrade() {
                Some(machine) if machine.throttle_percent().1 > 0 => Err(GuestError::new("injected")),
                _ => Ok(()),
            });
        });
        assert_eq!((report.outcome, owner), (Outcome::Failed, Owner::Source), "{method}: {}", report.reason);
        assert!(report.reason.contains("injected") && most > 0, "{method}: {}", report.reason);
    }
}

/// While the operator holds the switchover back nobody knows for how long: the guest runs freely.
#[test]
fn it_is_not_held_while_the_operator_holds_the_switchover() {
    let pair = pair(MigrationMode::Precopy, 99);
    let control = pair.source_control.clone();
    control.hold();
    let steering = std::thread::spawn(move || {
        // Also if something is not as expected here.
        let release = Release(control.clone());
        wait_throttled(&control);
        let deadline = Instant::now() + PATIENCE;
        while !control.status().waiting {
            assert!(Instant::now() < deadline, "{:?}", control.status());
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(control.status().throttle_percent, 0);
        drop(release);
    });
    let (report, owner, _) = moved(pair, |_, _| ());
    steering.join().expect("the steering thread");
    assert_eq!((report.outcome, owner), (Outcome::Completed, Owner::Destination), "{}", report.reason);
}

/// It goes on for ever, until the operator allows throttling, and then takes it back.
#[test]
fn the_limit_can_be_changed_on_the_way() {
    let mut pair = pair(MigrationMode::Precopy, 0);
    pair.source_options.limits.downtime = Duration::from_millis(20);
    let control = pair.source_control.clone();
    let steering = std::thread::spawn(move || {
        control.set_throttle_limit(90);
        wait_throttled(&control);
        control.set_throttle_limit(0);
    });
    let (report, owner, most) = moved(pair, |_, _| ());
    steering.join().expect("the steering thread");
    assert_eq!((report.outcome, owner), (Outcome::Failed, Owner::Source), "{}", report.reason);
    assert!((1..=90).contains(&most));
}
