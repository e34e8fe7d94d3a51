//! Machines that move, and what they hold afterwards.

use std::sync::Arc;
use std::time::Duration;

use migration::guest::BLOCK_BYTES;
use migration::report::Outcome;
use migration::testing::{FakeMachine, Pair, Workload, World};

fn machines(pages: u64, disks: &[u64]) -> (Arc<World>, Arc<FakeMachine>, Arc<FakeMachine>) {
    let world = World::new();
    let layout = FakeMachine::layout(pages, disks);
    let source = FakeMachine::new("a", layout.clone(), &world);
    let destination = FakeMachine::new("b", layout, &world);
    (world, source, destination)
}

#[test]
fn an_idle_machine_moves() {
    let (world, source, destination) = machines(1000, &[]);
    source.boot(Workload { filled_pages: 700, ..Workload::default() });
    let (report, received) = Pair::new().run(&source, &destination);
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    let received = received.expect("it arrived");
    assert_eq!(received.warning, None);
    assert_eq!(world.running(), ["b"]);
    assert!(source.is_fenced());
    assert_eq!(report.verification.memory_digest_ok, Some(true));
    assert_eq!(report.verification.pages_checked, 700 - 88);
    assert_eq!(report.tls.version, "TLSv1_3");
    destination.check().expect("memory as the guest left it");
    assert_eq!(world.violations(), Vec::<String>::new());
}

#[test]
fn a_busy_machine_with_a_disk_moves() {
    let (world, source, destination) = machines(8192, &[40 * BLOCK_BYTES]);
    // An old image at the destination: holes must be punched into it.
    destination.disks[0].poke(39, vec![0xee; BLOCK_BYTES as usize]);
    source.boot(Workload {
        filled_pages: 4000,
        sweep_pages: 2000,
        pages_per_ms: 40,
        sweep_blocks: 20,
        blocks_per_16_pages: 1,
    });
    std::thread::sleep(Duration::from_millis(100));
    let (report, received) = Pair::new().run(&source, &destination);
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    assert_eq!(received.expect("it arrived").warning, None);
    assert_eq!(destination.disks[0].block(39), None);
    assert_eq!(report.verification.disk_digest_ok, Some(true));
    std::thread::sleep(Duration::from_millis(50));
    destination.check().expect("memory and disk as the guest left them");
    assert_eq!(world.violations(), Vec::<String>::new());
    assert!(!source.memory.is_tracking() && !destination.memory.is_tracking());
    println!("{report:#?}");
}
