//! Cancel in each phase, at either end.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use migration::control::{Control, Phase, TooLate};
use migration::guest::BLOCK_BYTES;
use migration::policy::MigrationMode;
use migration::report::Outcome;
use migration::testing::{FakeMachine, Owner, Pair, Workload, machines, settle};

/// A call into the machine that happens in this phase of the source: (at the source?, method). A new phase does not
/// compile until somebody has decided where it is cancelled.
fn during(phase: Phase) -> Option<(bool, &'static str)> {
    match phase {
        Phase::Handshake => Some((false, "prepare")),
        Phase::Precopy => Some((true, "read_pages")),
        Phase::Switchover => Some((true, "save_state")),
        Phase::Committed => Some((false, "destination.resume")),
        // A page that the guest waits for, or that is pushed.
        Phase::Postcopy => Some((true, "read_pages")),
        Phase::Verify => Some((false, "destination.read_pages")),
        Phase::Ended => None,
    }
}

fn cancel_in(
    machine: &FakeMachine,
    method: &'static str,
    control: &Control,
    only: Option<Phase>,
) -> Arc<std::sync::Mutex<Option<Result<(), TooLate>>>> {
    let answer = Arc::new(std::sync::Mutex::new(None));
    let (control, kept) = (control.clone(), Arc::clone(&answer));
    machine.faults.on(method, move |_| {
        if only.is_some_and(|phase| control.status().phase != phase) {
            return Ok(());
        }
        let result = control.cancel();
        kept.lock().expect("not poisoned").get_or_insert(result);
        Ok(())
    });
    answer
}

fn workload() -> Workload {
    Workload {
        filled_pages: 300,
        sweep_pages: 200,
        pages_per_ms: 5,
        sweep_blocks: 6,
        blocks_per_16_pages: 1,
        ..Workload::default()
    }
}

#[test]
fn in_every_phase_at_the_source() {
    assert_eq!(Phase::ALL.len(), 7);
    for phase in Phase::ALL {
        let (world, source, destination) = machines(1024, &[12 * BLOCK_BYTES]);
        source.boot(workload());
        let mut pair = Pair::new();
        let only = (phase == Phase::Postcopy).then_some(phase);
        if only.is_some() {
            destination.offers_postcopy.store(true, Ordering::SeqCst);
            pair.source_options.limits.mode = MigrationMode::Postcopy;
            pair.source_options.limits.bandwidth_bytes_per_second = Some(4 << 20);
        }
        let control = pair.source_control.clone();
        let answer = during(phase).map(|(at_source, method)| {
            cancel_in(if at_source { &source } else { &destination }, method, &control, only)
        });
        let (report, received) = pair.run(&source, &destination);
        let answer = match answer {
            Some(answer) => answer.lock().expect("not poisoned").expect("the phase was reached"),
            None => control.cancel(),
        };
        let owner = settle(&world, &source, &destination, &report, &received)
            .unwrap_or_else(|error| panic!("{phase:?}: {error}"));
        if phase < Phase::Committed {
            assert_eq!(answer, Ok(()), "{phase:?}");
            assert_eq!((report.outcome, owner), (Outcome::Cancelled, Owner::Source), "{phase:?}: {}", report.reason);
            assert!(report.reason.contains("cancelled"), "{}", report.reason);
        } else {
            assert_eq!(answer, Err(TooLate), "{phase:?}");
            assert_eq!((report.outcome, owner), (Outcome::Completed, Owner::Destination), "{phase:?}");
        }
        assert_eq!(control.status().phase, Phase::Ended);
    }
}

#[test]
fn at_the_destination() {
    for (at_source, method, in_time) in [
        (false, "prepare", true),
        (true, "read_pages", true),
        (true, "save_state", true),
        (false, "restore_state", true),
        // Between Prepared and Commit: the destination says that it did not run the machine.
        (true, "fence", true),
        (false, "destination.resume", false),
        (false, "destination.read_pages", false),
    ] {
        let (world, source, destination) = machines(1024, &[12 * BLOCK_BYTES]);
        source.boot(workload());
        let pair = Pair::new();
        let control = pair.destination_control.clone();
        let answer = cancel_in(if at_source { &source } else { &destination }, method, &control, None);
        let (report, received) = pair.run(&source, &destination);
        let owner = settle(&world, &source, &destination, &report, &received)
            .unwrap_or_else(|error| panic!("{method}: {error}"));
        let answer = answer.lock().expect("not poisoned").expect("the call was reached");
        if in_time {
            assert_eq!(answer, Ok(()), "{method}");
            assert_eq!(owner, Owner::Source, "{method}: {}", report.reason);
            assert!(report.reason.contains("cancelled at the destination"), "{method}: {}", report.reason);
        } else {
            assert_eq!((answer, owner), (Err(TooLate), Owner::Destination), "{method}");
        }
    }
}

#[test]
fn while_nobody_listens_and_before_it_starts() {
    let (world, source, destination) = machines(64, &[]);
    source.boot(Workload::default());
    let mut pair = Pair::new();
    pair.source_control.cancel().expect("nothing has begun");
    pair.destination_control.cancel().expect("nothing has begun");
    let receiving = pair.receive(&destination);
    let report = pair.send(&source);
    let received = receiving.join().expect("no panic");
    assert_eq!(report.outcome, Outcome::Cancelled);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source));
}

/// A peer that has stopped reading does not hold a cancel up.
#[test]
fn while_the_destination_is_stuck() {
    let (world, source, destination) = machines(16_384, &[]);
    source.boot(Workload { filled_pages: 16_000, ..Workload::default() });
    let mut pair = Pair::new();
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    destination.faults.on("write_pages", move |_| {
        let _ = wait.lock().expect("not poisoned").recv();
        Ok(())
    });
    let receiving = pair.receive(&destination);
    let control = pair.source_control.clone();
    let start = std::time::Instant::now();
    let canceller = std::thread::spawn(move || {
        while control.status().phase != Phase::Precopy || control.status().bytes_done == 0 {
            std::thread::yield_now();
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        control.cancel()
    });
    let report = pair.send(&source);
    assert!(start.elapsed() < std::time::Duration::from_secs(3), "{:?}", start.elapsed());
    assert_eq!(canceller.join().expect("no panic"), Ok(()));
    drop(release);
    let received = receiving.join().expect("no panic");
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source));
    assert_eq!(report.outcome, Outcome::Cancelled);
}
