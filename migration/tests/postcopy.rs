//! Post-copy: the machine runs at the destination before all of it is there, and nothing is lost on the way.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use migration::control::Phase;
use migration::destination::DestinationError;
use migration::guest::BLOCK_BYTES;
use migration::policy::MigrationMode;
use migration::report::{Mode, Outcome};
use migration::testing::{FakeMachine, Owner, Pair, Proxy, Workload, World, machines, settle};

/// Dirties tens of megabytes a second of memory, and blocks of its disk.
fn busy() -> Workload {
    Workload {
        filled_pages: 600,
        sweep_pages: 1200,
        pages_per_ms: 20,
        sweep_blocks: 8,
        blocks_per_16_pages: 1,
        ..Workload::default()
    }
}

fn busy_machines() -> (Arc<World>, Arc<FakeMachine>, Arc<FakeMachine>) {
    let (world, source, destination) = machines(8192, &[40 * BLOCK_BYTES, 3 * BLOCK_BYTES + 512]);
    destination.offers_postcopy.store(true, Ordering::SeqCst);
    source.boot(busy());
    std::thread::sleep(Duration::from_millis(50));
    (world, source, destination)
}

/// A pair whose link is slower than the guest writes.
fn slow_pair(mode: MigrationMode) -> Pair {
    let mut pair = Pair::new();
    pair.source_options.limits.mode = mode;
    pair.source_options.limits.bandwidth_bytes_per_second = Some(4 << 20);
    pair.source_options.limits.downtime = Duration::from_millis(20);
    pair
}

/// From Commit on every page takes its time, so that there is a post-copy to disturb.
fn long_postcopy(source: &FakeMachine, pair: &Pair) {
    let control = pair.source_control.clone();
    source.faults.on("read_pages", move |_| {
        if control.status().phase == Phase::Postcopy {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    });
}

fn until(what: &str, mut check: impl FnMut() -> bool) {
    let start = Instant::now();
    while !check() {
        assert!(start.elapsed() < Duration::from_secs(30), "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_guest_faster_than_the_link_moves_by_falling_over() {
    let (world, source, destination) = busy_machines();
    let (report, received) = slow_pair(MigrationMode::Hybrid).run(&source, &destination);
    assert_eq!((report.outcome, report.mode), (Outcome::Completed, Mode::Hybrid), "{}", report.reason);
    let totals = report.postcopy.clone().expect("post-copy totals");
    assert!(totals.faults > 0 && totals.fault_us_p50 > 0.0, "{totals:?}");
    assert!(totals.fault_us_p99 >= totals.fault_us_p50 && totals.recoveries == 0, "{totals:?}");
    assert!(report.rounds.len() >= 3, "it went on with pre-copy as long as that was of use");
    let received = received.expect("it arrived");
    assert_eq!(received.warning, None);
    let verification = &report.verification;
    assert_eq!((verification.memory_digest_ok, verification.disk_digest_ok), (Some(true), Some(true)));
    assert!(verification.pages_checked > 500, "{verification:?}");
    assert_eq!(settle(&world, &source, &destination, &report, &Ok(received)), Ok(Owner::Destination));
}

#[test]
fn postcopy_alone_begins_after_one_round_and_the_downtime_is_short() {
    let (world, source, destination) = busy_machines();
    let mut pair = slow_pair(MigrationMode::Postcopy);
    pair.source_options.limits.streams = 3;
    let (report, received) = pair.run(&source, &destination);
    assert_eq!((report.outcome, report.mode), (Outcome::Completed, Mode::Postcopy), "{}", report.reason);
    // Round 0 and the last one, which is empty.
    assert_eq!(report.rounds.len(), 2, "{:?}", report.rounds);
    assert_eq!(report.rounds[1].pages, 0);
    // What is left takes the link a second.
    assert!(report.downtime_ms.total < 300.0, "{:?}", report.downtime_ms);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination));
}

#[test]
fn there_and_back_again() {
    let world = World::new();
    let layout = FakeMachine::layout(4096, &[24 * BLOCK_BYTES]);
    let hosts = [FakeMachine::new("a", layout.clone(), &world), FakeMachine::new("b", layout, &world)];
    hosts.iter().for_each(|host| host.offers_postcopy.store(true, Ordering::SeqCst));
    hosts[0].boot(busy());
    for turn in 0..4 {
        let (source, destination) = (&hosts[turn % 2], &hosts[(turn + 1) % 2]);
        let (report, received) = slow_pair(MigrationMode::Postcopy).run(source, destination);
        assert_eq!(report.outcome, Outcome::Completed, "turn {turn}: {}", report.reason);
        assert_eq!(received.expect("it arrived").warning, None);
        assert_eq!(world.violations(), Vec::<String>::new(), "turn {turn}");
    }
    hosts[0].check().expect("memory and disk as the guest left them");
}

#[test]
fn a_destination_that_cannot_is_not_asked() {
    let (world, source, destination) = busy_machines();
    destination.offers_postcopy.store(false, Ordering::SeqCst);
    let (report, received) = slow_pair(MigrationMode::Postcopy).run(&source, &destination);
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(report.reason.contains("does not offer post-copy"), "{}", report.reason);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source));
    let (world, source, destination) = busy_machines();
    destination.offers_postcopy.store(false, Ordering::SeqCst);
    let (report, received) = slow_pair(MigrationMode::Hybrid).run(&source, &destination);
    assert!(report.reason.contains("does not converge"), "{}", report.reason);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source));
}

/// A guest that touches little: the rest is pushed.
#[test]
fn what_nobody_asks_for_is_pushed() {
    let (world, source, destination) = machines(8192, &[40 * BLOCK_BYTES]);
    destination.offers_postcopy.store(true, Ordering::SeqCst);
    source.boot(Workload { pages_per_ms: 2, ..busy() });
    std::thread::sleep(Duration::from_millis(50));
    let mut pair = slow_pair(MigrationMode::Postcopy);
    pair.source_options.limits.bandwidth_bytes_per_second = None;
    let (report, received) = pair.run(&source, &destination);
    let totals = report.postcopy.clone().expect("post-copy totals");
    assert!(totals.pushed_pages > totals.faults, "{totals:?}");
    // What follows a fault comes before the guest gets there: it walks through a thousand pages with few stops.
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination));
}

/// The link is cut in post-copy, again while the source reconnects, and once more later.
#[test]
fn a_link_cut_again_and_again_costs_time_and_nothing_else() {
    let (world, source, destination) = busy_machines();
    let mut pair = slow_pair(MigrationMode::Postcopy);
    long_postcopy(&source, &pair);
    let proxy = Proxy::start(pair.address(), None);
    pair.source_options.address = proxy.address();
    let (source_control, destination_control) = (pair.source_control.clone(), pair.destination_control.clone());
    let moving = {
        let (source, destination) = (Arc::clone(&source), Arc::clone(&destination));
        std::thread::spawn(move || pair.run(&source, &destination))
    };
    until("post-copy", || source_control.status().phase == Phase::Postcopy);
    assert!(source_control.cancel().is_err() && destination_control.cancel().is_err(), "cancelled after Commit");
    let before = proxy.connections();
    proxy.sever(true);
    // Refused a few times: both ends say what they wait for.
    until("words at the source", || source_control.status().note.is_some_and(|note| note.contains("reconnecting")));
    until("words at the destination", || {
        destination_control.status().note.is_some_and(|note| note.contains("have not arrived"))
    });
    until("attempts", || proxy.connections() >= before + 2);
    // Now the handshake of a new session is cut.
    let now = proxy.connections();
    proxy.sever(false);
    until("a handshake", || proxy.connections() > now);
    proxy.sever(false);
    until("a new session", || source_control.status().note.is_none());
    std::thread::sleep(Duration::from_millis(200));
    proxy.sever(false);
    let (report, received) = moving.join().expect("no panic");
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    let totals = report.postcopy.clone().expect("post-copy totals");
    assert!(totals.recoveries >= 2, "{totals:?}");
    assert_eq!(report.verification.memory_digest_ok, Some(true), "{:?}", received);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination));
}

/// The source never comes back: the destination says what is missing and stops the machine.
#[test]
fn what_is_lost_is_said() {
    let (world, source, destination) = busy_machines();
    let mut pair = slow_pair(MigrationMode::Postcopy);
    pair.destination_options.recover = Duration::from_millis(700);
    long_postcopy(&source, &pair);
    let proxy = Proxy::start(pair.address(), None);
    pair.source_options.address = proxy.address();
    let control = pair.source_control.clone();
    let receiving = pair.receive(&destination);
    let sending = {
        let source = Arc::clone(&source);
        std::thread::spawn(move || pair.send(&source))
    };
    until("post-copy", || control.status().phase == Phase::Postcopy);
    proxy.cut_now();
    let lost = receiving.join().expect("no panic").expect_err("it is not all there");
    assert!(matches!(&lost, DestinationError::Lost { reason } if reason.contains("pages and")), "{lost}");
    assert_eq!(destination.lost().map(|reason| lost.to_string().contains(&reason)), Some(true));
    assert!(!destination.is_running() && !destination.is_discarded());
    // The source goes on trying until the operator gives up; it never runs the machine again by itself.
    assert!(control.status().note.is_some());
    control.abandon();
    let report = sending.join().expect("no panic");
    assert_eq!(report.outcome, Outcome::InDoubt);
    assert!(report.reason.contains("gave the post-copy up"), "{}", report.reason);
    assert!(source.is_fenced() && !source.is_running());
    assert_eq!(world.violations(), Vec::<String>::new());
}

/// Before Commit every failure leaves the machine at the source, whatever was prepared for post-copy.
#[test]
fn failures_before_commit_leave_it_at_the_source() {
    let at_destination = [
        ("forget_pages", 1),
        ("forget_pages", 2),
        ("expect_pages", 1),
        ("disk.expect_blocks", 2),
        ("restore_state", 1),
        ("destination.resume", 1),
    ];
    let at_source = [("pause", 1), ("save_state", 1), ("fence", 1)];
    let all = at_destination.map(|call| (false, call)).into_iter().chain(at_source.map(|call| (true, call)));
    for (at_source, (method, nth)) in all {
        let (world, source, destination) = busy_machines();
        let broken = if at_source { &source } else { &destination };
        broken.faults.fail(method, nth);
        let (report, received) = slow_pair(MigrationMode::Postcopy).run(&source, &destination);
        assert_eq!(report.outcome, Outcome::Failed, "{method}: {}", report.reason);
        assert!(report.reason.contains(&format!("injected fault in {method}")), "{method}: {}", report.reason);
        assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source), "{method}");
    }
}

/// After Commit a broken fault thread stops the guest with words instead of letting it hang.
#[test]
fn a_broken_fault_thread_is_reported() {
    for method in ["missing.wanted", "missing.fill"] {
        let (_, source, destination) = busy_machines();
        let mut pair = slow_pair(MigrationMode::Postcopy);
        long_postcopy(&source, &pair);
        let control = pair.source_control.clone();
        let faults = Arc::clone(&destination.faults);
        let late = control.clone();
        faults.on(method, move |_| match late.status().phase {
            Phase::Postcopy => Err(migration::guest::GuestError::new("injected")),
            _ => Ok(()),
        });
        let receiving = pair.receive(&destination);
        let sending = {
            let source = Arc::clone(&source);
            std::thread::spawn(move || pair.send(&source))
        };
        let lost = receiving.join().expect("no panic").expect_err("it cannot go on");
        assert!(lost.to_string().contains("injected"), "{method}: {lost}");
        assert!(destination.lost().is_some() && !destination.is_running());
        control.abandon();
        assert_eq!(sending.join().expect("no panic").outcome, Outcome::InDoubt);
    }
}
