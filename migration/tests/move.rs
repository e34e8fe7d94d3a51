//! Machines that move, and what they hold afterwards.

use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::guest::{BLOCK_BYTES, GuestError, SourceGuest};
use migration::policy::Limits;
use migration::report::Outcome;
use migration::testing::{FakeMachine, Owner, Pair, Workload, World, machines, settle};

fn busy() -> Workload {
    Workload {
        filled_pages: 2000,
        sweep_pages: 1000,
        pages_per_ms: 20,
        sweep_blocks: 20,
        blocks_per_16_pages: 1,
        ..Workload::default()
    }
}

#[test]
fn an_idle_machine_moves() {
    let (world, source, destination) = machines(1000, &[]);
    source.boot(Workload { filled_pages: 700, ..Workload::default() });
    let (report, received) = Pair::new().run(&source, &destination);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination));
    assert_eq!(received.expect("it arrived").warning, None);
    assert_eq!(report.verification.memory_digest_ok, Some(true));
    assert_eq!(report.verification.pages_checked, 700 - 88);
    assert_eq!(report.memory.pages_zero, 300 + 88);
    assert_eq!(report.tls.version, "TLSv1_3");
    let parts = &report.downtime_ms;
    let sum = parts.pause + parts.final_pages + parts.final_blocks + parts.state + parts.commit + parts.resume;
    assert!((sum - parts.total).abs() < 0.5 + parts.total / 10.0, "{parts:?}");
}

#[test]
fn what_the_machine_warns_of_is_in_the_report() {
    for fails in [false, true] {
        let (world, source, destination) = machines(1000, &[]);
        source.boot(Workload::default());
        source.warnings.lock().expect("not poisoned").push("a ring was full".to_owned());
        if fails {
            source.faults.on("save_state", |_| Err(GuestError::new("injected")));
        }
        let (report, received) = Pair::new().run(&source, &destination);
        let owner = settle(&world, &source, &destination, &report, &received);
        assert_eq!(owner, Ok(if fails { Owner::Source } else { Owner::Destination }), "{}", report.reason);
        assert_eq!(report.warnings, ["a ring was full"]);
    }
}

#[test]
fn a_busy_machine_with_a_disk_moves() {
    let (world, source, destination) = machines(8192, &[40 * BLOCK_BYTES, 3 * BLOCK_BYTES + 512]);
    // An old image at the destination: holes must be punched into it.
    destination.disks[0].poke(39, vec![0xee; BLOCK_BYTES as usize]);
    // The last block is shorter than the others.
    source.disks[1].guest_write(3, vec![0x5a; 512]);
    source.boot(busy());
    std::thread::sleep(Duration::from_millis(100));
    let (report, received) = Pair::new().run(&source, &destination);
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination));
    assert_eq!(destination.disks[0].block(39), None);
    assert_eq!(destination.disks[1].block(3), Some(vec![0x5a; 512]));
    assert_eq!(report.verification.disk_digest_ok, Some(true));
    assert!(!destination.memory.is_tracking() && !destination.disks[0].is_tracking());
}

/// A to B to A to B and so on; the sweeper and its oracle run all the way.
#[test]
fn back_and_forth() {
    let world = World::new();
    let layout = FakeMachine::layout(4096, &[24 * BLOCK_BYTES]);
    let hosts = [FakeMachine::new("a", layout.clone(), &world), FakeMachine::new("b", layout, &world)];
    hosts[0].boot(busy());
    for turn in 0..6 {
        let (source, destination) = (&hosts[turn % 2], &hosts[(turn + 1) % 2]);
        let mut pair = Pair::new();
        // What arrives is looked at, and not whether this computer has time to spare for convergence.
        pair.source_options.limits.force_switchover = true;
        let (report, received) = pair.run(source, destination);
        assert_eq!(report.outcome, Outcome::Completed, "turn {turn}: {}", report.reason);
        assert_eq!(received.expect("it arrived").warning, None);
        assert_eq!(world.violations(), Vec::<String>::new(), "turn {turn}");
    }
    hosts[0].check().expect("memory and disk as the guest left them");
}

#[test]
fn many_channels_share_the_work() {
    let (world, source, destination) = machines(8192, &[24 * BLOCK_BYTES]);
    source.boot(Workload { filled_pages: 5000, ..busy() });
    let mut pair = Pair::new();
    pair.source_options.limits.streams = 5;
    let (report, received) = pair.run(&source, &destination);
    assert_eq!(report.streams, 5);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination));
}

/// What the fake guest holds becomes less than two thirds; a link of 20 MB/s is slower than any compression.
#[test]
fn a_slow_link_gets_compressed_pages_and_blocks() {
    for streams in [1, 3] {
        let (world, source, destination) = machines(8192, &[100 * BLOCK_BYTES]);
        source.boot(Workload { filled_pages: 4000, sweep_pages: 100, pages_per_ms: 1, ..busy() });
        for block in 20..90 {
            source.disks[0].guest_write(block, vec![block as u8; BLOCK_BYTES as usize]);
        }
        let mut pair = Pair::new();
        pair.source_options.limits.streams = streams;
        pair.source_options.limits.bandwidth_bytes_per_second = Some(20_000_000);
        let (report, received) = pair.run(&source, &destination);
        assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination));
        assert_eq!(report.verification.memory_digest_ok, Some(true));
        let (pages, bytes) = (4000 * 7 / 8 * 4096, report.rounds[0].bytes);
        assert!(bytes < pages * 2 / 3 + (10 << 20) * u64::from(streams) / 3, "{bytes} of {pages} bytes");
        assert!(report.disk.bytes_sent < 45 * BLOCK_BYTES, "{} blocks", report.disk.bytes_sent / BLOCK_BYTES);
    }
}

#[test]
fn full_images_are_compared_before_commit() {
    let (world, source, destination) = machines(2048, &[10 * BLOCK_BYTES + 1024]);
    source.boot(Workload {
        filled_pages: 1000,
        sweep_pages: 200,
        sweep_blocks: 5,
        pages_per_ms: 20,
        blocks_per_16_pages: 1,
        ..Workload::default()
    });
    let mut pair = Pair::new();
    pair.source_options.limits.compare_full = true;
    let (report, received) = pair.run(&source, &destination);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination));
}

#[test]
fn a_full_comparison_names_the_first_difference() {
    for disk in [false, true] {
        let (world, source, destination) = machines(2048, &[10 * BLOCK_BYTES]);
        source.boot(Workload { filled_pages: 1000, sweep_blocks: 5, ..Workload::default() });
        let mut pair = Pair::new();
        pair.source_options.limits.compare_full = true;
        // While the state is saved everything has arrived, or is on its way; a hole stays as it is.
        let spoiled = Arc::clone(&destination);
        source.faults.on("save_state", move |_| {
            if disk {
                spoiled.disks[0].poke(9, vec![1; BLOCK_BYTES as usize]);
            } else {
                spoiled.memory.write(1234, &[1; 4096], false);
            }
            Ok(())
        });
        let (report, received) = pair.run(&source, &destination);
        assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source));
        let expected = if disk { "block 9 of disk 0" } else { "page 1234" };
        assert!(report.reason.contains(expected), "{}", report.reason);
    }
}

/// What was spoiled on the way is found after the resume, and told by both ends.
#[test]
fn verification_after_the_resume_finds_a_spoiled_page() {
    let (_, source, destination) = machines(2048, &[10 * BLOCK_BYTES]);
    source.boot(Workload { filled_pages: 1000, ..Workload::default() });
    source.disks[0].guest_write(4, vec![3; BLOCK_BYTES as usize]);
    let spoiled = Arc::clone(&destination);
    destination.faults.on("destination.resume", move |_| {
        spoiled.memory.write(77, &[1; 4096], false);
        spoiled.disks[0].poke(4, vec![4; BLOCK_BYTES as usize]);
        Ok(())
    });
    let (report, received) = Pair::new().run(&source, &destination);
    assert_eq!(report.outcome, Outcome::Completed);
    assert_eq!(report.verification.memory_digest_ok, Some(false));
    assert_eq!(report.verification.disk_digest_ok, Some(false));
    let warning = received.expect("it runs there all the same").warning.expect("a warning");
    for text in [&warning, &report.reason] {
        assert!(text.contains("page 77") && text.contains("block 4 of disk 0"), "{text}");
    }
}

/// A page that was written while the guest ran and that tracking did not report: the destination has what was sent, and that
/// is old.
#[test]
fn verification_after_the_resume_finds_a_page_that_tracking_lost() {
    for page in [77, 1500] {
        let (_, source, destination) = machines(2048, &[]);
        source.boot(Workload { filled_pages: 1000, ..Workload::default() });
        let forgetful = Arc::clone(&source);
        // Round 0 has been sent. Page 77 went with it, page 1500 has never been touched before.
        source.faults.on("collect_dirty", move |call| {
            if call == 1 {
                forgetful.memory.write(page, &[9; 4096], false);
            }
            Ok(())
        });
        let (report, received) = Pair::new().run(&source, &destination);
        assert_eq!(report.outcome, Outcome::Completed);
        assert_eq!(report.verification.memory_digest_ok, Some(false));
        let warning = received.expect("it runs there all the same").warning.expect("a warning");
        assert!(warning.contains(&format!("the first is page {page}")), "{warning}");
    }
}

#[test]
fn a_budget_is_kept_and_can_be_changed_while_running() {
    let (world, source, destination) = machines(8192, &[]);
    source.boot(Workload { filled_pages: 4096, ..Workload::default() });
    let mut pair = Pair::new();
    // 14 MiB at 4 MiB/s would take 3.5 s.
    pair.source_options.limits.bandwidth_bytes_per_second = Some(4 << 20);
    let control = pair.source_control.clone();
    let start = Instant::now();
    let watcher = std::thread::spawn(move || {
        while start.elapsed() < Duration::from_millis(700) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let status = control.status();
        control.set_bandwidth(None);
        status
    });
    let (report, received) = pair.run(&source, &destination);
    let status = watcher.join().expect("the watcher");
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination));
    assert!(start.elapsed() >= Duration::from_millis(700), "faster than the budget: {:?}", start.elapsed());
    let rate = status.bytes_per_second / f64::from(1 << 20);
    assert!((2.0..6.0).contains(&rate), "{rate} MiB/s");
    assert!(status.bytes_remaining > 4 << 20, "{status:?}");
    assert!(status.expected_remaining.is_some_and(|left| left > Duration::from_secs(1)), "{status:?}");
}

#[test]
fn a_guest_that_outruns_the_link_stays_where_it_is() {
    let (world, source, destination) = machines(4096, &[]);
    source.boot(Workload { filled_pages: 100, sweep_pages: 1000, pages_per_ms: 20, ..Workload::default() });
    let mut pair = Pair::new();
    // 80 MiB/s against 8 MiB/s.
    pair.source_options.limits =
        Limits { bandwidth_bytes_per_second: Some(8 << 20), downtime: Duration::from_millis(20), ..Limits::default() };
    let (report, received) = pair.run(&source, &destination);
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(report.reason.contains("does not converge"), "{}", report.reason);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source));

    // With the operator's leave it moves all the same.
    let (world, source, destination) = machines(4096, &[]);
    source.boot(Workload { filled_pages: 100, sweep_pages: 1000, pages_per_ms: 20, ..Workload::default() });
    let mut pair = Pair::new();
    pair.source_options.limits = Limits {
        bandwidth_bytes_per_second: Some(8 << 20),
        downtime: Duration::from_millis(20),
        force_switchover: true,
        ..Limits::default()
    };
    let (report, received) = pair.run(&source, &destination);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination));
    assert!(report.downtime_ms.total > 20.0);
}

#[test]
fn time_allowed_is_kept() {
    let (world, source, destination) = machines(4096, &[]);
    source.boot(Workload { filled_pages: 4000, ..Workload::default() });
    let mut pair = Pair::new();
    pair.source_options.limits.bandwidth_bytes_per_second = Some(1 << 20);
    pair.source_options.limits.timeout = Duration::from_millis(500);
    let start = Instant::now();
    let (report, received) = pair.run(&source, &destination);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(report.reason.contains("not ready for the switchover"), "{}", report.reason);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source));
}

/// A paused machine moves too, and a retry after a failure works.
#[test]
fn a_retry_after_a_failure_works() {
    let (world, source, destination) = machines(4096, &[24 * BLOCK_BYTES]);
    source.boot(busy());
    destination.faults.fail("restore_state", 1);
    let authority = {
        let pair = Pair::new();
        let mut pair = pair;
        let receiving = pair.receive(&destination);
        let report = pair.send(&source);
        assert_eq!(report.outcome, Outcome::Failed, "{}", report.reason);
        assert!(report.reason.contains("injected fault in restore_state"), "{}", report.reason);
        assert!(receiving.join().expect("no panic").is_err());
        pair.authority
    };
    assert_eq!(world.running(), ["a"]);
    std::thread::sleep(Duration::from_millis(20));
    let (report, received) = Pair::under(authority).run(&source, &destination);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination));
    assert!(SourceGuest::resume(&*source).is_err(), "the fence holds");
}
