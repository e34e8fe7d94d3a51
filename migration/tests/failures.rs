//! Every call into the machine fails once, at either end; the machine is never lost and never doubled.

use migration::guest::BLOCK_BYTES;
use migration::report::{Outcome, Report};
use migration::testing::{Owner, Pair, Workload, machines, settle};

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

/// Moves a machine with one fault in it, and lets both ends settle.
fn with_fault(at_source: bool, method: &'static str, nth: u64) -> (Report, Owner) {
    let (world, source, destination) = machines(1024, &[12 * BLOCK_BYTES]);
    source.boot(workload());
    let broken = if at_source { &source } else { &destination };
    broken.faults.fail(method, nth);
    // One page loses its data while the first round is over, so that a page of zeroes has to be sent.
    if method == "zero_pages" {
        source.memory.write(900, &[1; 4096], true);
        let memory = std::sync::Arc::clone(&source.memory);
        source.faults.on("collect_dirty", move |call| {
            if call == 1 {
                memory.write(900, &[0; 4096], true);
            }
            Ok(())
        });
    }
    let (report, received) = Pair::new().run(&source, &destination);
    let calls = broken.faults.calls(method);
    assert!(calls >= nth, "{method} was called {calls} times only: {}", report.reason);
    let owner = settle(&world, &source, &destination, &report, &received)
        .unwrap_or_else(|error| panic!("{method}, call {nth}: {error}"));
    (report, owner)
}

#[test]
fn the_source_fails_at_each_call_before_commit() {
    let calls = [
        ("layout", 1),
        ("start_dirty_tracking", 1),
        ("next_populated", 1),
        ("next_populated", 2),
        ("read_pages", 1),
        ("read_pages", 3),
        ("collect_dirty", 1),
        ("collect_dirty", 2),
        ("pause", 1),
        ("save_state", 1),
        ("fence", 1),
        ("disk.start_dirty_tracking", 1),
        ("disk.next_data", 1),
        ("disk.reader", 1),
        ("disk.submit", 1),
        ("disk.submit", 4),
        ("disk.complete", 1),
        ("disk.complete", 3),
        ("disk.collect_dirty", 1),
        ("disk.collect_dirty", 2),
    ];
    for (method, nth) in calls {
        let (report, owner) = with_fault(true, method, nth);
        assert_eq!((report.outcome, owner), (Outcome::Failed, Owner::Source), "{method}: {}", report.reason);
        assert!(report.reason.contains(&format!("injected fault in {method}, call {nth}")), "{}", report.reason);
    }
}

#[test]
fn the_destination_fails_at_each_call_before_it_runs() {
    let calls = [
        ("prepare", 1),
        ("write_pages", 1),
        ("write_pages", 4),
        ("zero_pages", 1),
        ("disk.writer", 1),
        ("disk.write", 1),
        ("disk.write", 3),
        ("disk.zero", 1),
        ("disk.flush", 1),
        ("restore_state", 1),
        ("destination.resume", 1),
    ];
    for (method, nth) in calls {
        let (report, owner) = with_fault(false, method, nth);
        assert_eq!((report.outcome, owner), (Outcome::Failed, Owner::Source), "{method}: {}", report.reason);
        assert!(report.reason.contains(&format!("injected fault in {method}, call {nth}")), "{}", report.reason);
    }
}

/// After the resume nothing brings the machine back; what could not be checked is said.
#[test]
fn faults_after_the_resume_leave_it_at_the_destination() {
    let calls = [
        ("destination.read_pages", 1),
        ("destination.collect_dirty", 1),
        ("disk.reader", 1),
        ("disk.submit", 1),
        ("disk.complete", 1),
        ("disk.collect_dirty", 1),
    ];
    for (method, nth) in calls {
        let (report, owner) = with_fault(false, method, nth);
        assert_eq!((report.outcome, owner), (Outcome::Completed, Owner::Destination), "{method}: {}", report.reason);
        assert_eq!(report.verification.memory_digest_ok, None, "{method}");
    }
    for method in ["destination.stop_dirty_tracking", "disk.stop_dirty_tracking"] {
        let (report, owner) = with_fault(false, method, 1);
        assert_eq!((report.outcome, owner), (Outcome::Completed, Owner::Destination), "{method}: {}", report.reason);
    }
}

#[test]
fn a_refused_layout_is_told_in_the_destinations_words() {
    let (world, source, _) = machines(1024, &[12 * BLOCK_BYTES]);
    let (_, _, destination) = machines(512, &[]);
    source.boot(workload());
    let (report, received) = Pair::new().run(&source, &destination);
    assert!(report.reason.contains("this host cannot build such a machine"), "{}", report.reason);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source));
}

/// If the guest cannot be resumed after a failure, the report says so too.
#[test]
fn a_failed_resume_at_the_source_is_told() {
    let (_, source, destination) = machines(1024, &[]);
    source.boot(Workload { sweep_blocks: 0, ..workload() });
    destination.faults.fail("restore_state", 1);
    source.faults.fail("resume", 1);
    let (report, _) = Pair::new().run(&source, &destination);
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(report.reason.contains("injected fault in restore_state"), "{}", report.reason);
    assert!(report.reason.contains("could not be resumed"), "{}", report.reason);
}

#[test]
fn impossible_options_are_refused_before_anything_happens() {
    for streams in [0, 17] {
        let (world, source, destination) = machines(64, &[]);
        source.boot(Workload::default());
        let mut pair = Pair::new();
        pair.source_options.limits.streams = streams;
        pair.destination_options.deadline = std::time::Duration::from_millis(300);
        let (report, received) = pair.run(&source, &destination);
        assert!(report.reason.contains("1 to 16 are possible"), "{}", report.reason);
        assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source));
    }
}

/// The destination's disk hangs in the last flush: the guest is let go after a while, not after minutes.
#[test]
fn a_switchover_that_hangs_lets_the_guest_go() {
    let (world, source, destination) = machines(1024, &[12 * BLOCK_BYTES]);
    source.boot(workload());
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let (wait, disk) = (std::sync::Mutex::new(wait), std::sync::Arc::clone(&source.disks[0]));
    // One block is written at the last moment, and its flush does not come back.
    let stopped = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = std::sync::Arc::clone(&stopped);
    source.faults.on("pause", move |_| {
        disk.guest_write(11, vec![0; BLOCK_BYTES as usize]);
        seen.store(true, std::sync::atomic::Ordering::SeqCst);
        Ok(())
    });
    destination.faults.on("disk.flush", move |_| {
        if stopped.load(std::sync::atomic::Ordering::SeqCst) {
            let _ = wait.lock().expect("not poisoned").recv();
        }
        Ok(())
    });
    let mut pair = Pair::new();
    let receiving = pair.receive(&destination);
    let start = std::time::Instant::now();
    let report = pair.send(&source);
    assert!(start.elapsed() < std::time::Duration::from_secs(6), "{:?}", start.elapsed());
    drop(release);
    let received = receiving.join().expect("no panic");
    assert!(report.reason.contains("let go again"), "{}", report.reason);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source));
}
