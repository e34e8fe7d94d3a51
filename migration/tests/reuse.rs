//! What an earlier attempt has left at the destination is not sent again, and nothing that is wrong there stays.

use std::sync::Arc;

use migration::guest::BLOCK_BYTES;
use migration::report::{Outcome, Report};
use migration::testing::{FakeDisk, FakeMachine, Owner, Pair, Workload, machines, settle};

const BLOCK: usize = BLOCK_BYTES as usize;

/// A guest that leaves its disk alone.
fn quiet() -> Workload {
    Workload { filled_pages: 50, ..Workload::default() }
}

fn filled(seed: u64) -> Vec<u8> {
    seed.to_le_bytes().into_iter().cycle().take(BLOCK).collect()
}

fn copy(from: &FakeDisk, to: &FakeDisk, blocks: u64) {
    for block in 0..blocks {
        if let Some(bytes) = from.block(block) {
            to.poke(block, bytes);
        }
    }
}

fn same(a: &FakeMachine, b: &FakeMachine, blocks: u64) {
    let zeroes = vec![0; BLOCK];
    for block in 0..blocks {
        let read = |machine: &FakeMachine| machine.disks[0].block(block).unwrap_or_else(|| zeroes.clone());
        assert!(read(a) == read(b), "block {block} differs");
    }
}

/// Moves a machine onto images that hold something.
fn onto(
    source: &Arc<FakeMachine>,
    destination: &Arc<FakeMachine>,
) -> (Report, Result<migration::destination::Received, migration::destination::DestinationError>) {
    let mut pair = Pair::new();
    pair.destination_options.reuse = true;
    pair.run(source, destination)
}

/// The link breaks in the middle of the disk; the second attempt sends what had not arrived, and what was written since.
#[test]
fn a_second_attempt_sends_only_the_rest() {
    const BLOCKS: u64 = 3000;
    const ARRIVED: u64 = 2000;
    let (world, source, first) = machines(256, &[BLOCKS * BLOCK_BYTES]);
    for block in 0..BLOCKS {
        source.disks[0].poke(block, filled(block + 1));
    }
    source.boot(quiet());
    first.faults.fail("disk.write", ARRIVED + 1);
    let (report, received) = Pair::new().run(&source, &first);
    assert_eq!(report.outcome, Outcome::Failed, "{}", report.reason);
    assert!(received.is_err());

    let second = FakeMachine::new("b", FakeMachine::layout(256, &[BLOCKS * BLOCK_BYTES]), &world);
    copy(&first.disks[0], &second.disks[0], BLOCKS);
    let arrived: Vec<u64> = (0..BLOCKS).filter(|&block| first.disks[0].block(block).is_some()).collect();
    assert_eq!(arrived.len() as u64, ARRIVED);
    let rewritten = [arrived[0], arrived[1], arrived[1000], arrived[1999], BLOCKS - 1];
    for block in rewritten {
        source.disks[0].poke(block, filled(block + 1_000_000));
    }
    let (report, received) = onto(&source, &second);
    assert_eq!(settle(&world, &source, &second, &report, &received), Ok(Owner::Destination), "{}", report.reason);
    same(&source, &second, BLOCKS);
    let kept = arrived.iter().filter(|block| !rewritten.contains(block)).count() as u64;
    assert_eq!(report.disk.bytes_reused, kept * BLOCK_BYTES);
    let sent = (BLOCKS - kept) * BLOCK_BYTES;
    assert!(report.disk.bytes_sent <= sent + sent / 100, "{} for {sent}", report.disk.bytes_sent);
    assert_eq!(report.verification.disk_digest_ok, Some(true));
    assert_eq!(second.disks[0].unflushed(), 0);
}

/// Every kind of block meets every kind of block in the old image, over several windows, with a short last block.
#[test]
fn whatever_the_old_image_holds_is_put_right() {
    const BLOCKS: u64 = 2600;
    let bytes = (BLOCKS - 1) * BLOCK_BYTES + 512;
    let (world, source, destination) = machines(64, &[bytes]);
    let length = |block| if block == BLOCKS - 1 { 512 } else { BLOCK };
    let held = |kind: u64, block: u64| match kind {
        0 => None,
        1 => Some(vec![0; length(block)]),
        2 => Some(filled(block + 1)[..length(block)].to_vec()),
        _ => Some(filled(block + 7_000_000)[..length(block)].to_vec()),
    };
    let mut expected = 0;
    for block in 0..BLOCKS {
        let (here, there) = (block % 4, block / 4 % 4);
        for (disk, kind) in [(&source.disks[0], here), (&destination.disks[0], there)] {
            if let Some(bytes) = held(kind, block) {
                disk.poke(block, bytes);
            }
        }
        if here == there && here >= 2 {
            expected += length(block) as u64;
        }
    }
    source.boot(quiet());
    let (report, received) = onto(&source, &destination);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination), "{}", report.reason);
    let zeroes = |block| vec![0; length(block)];
    for block in 0..BLOCKS {
        let read = |machine: &FakeMachine| machine.disks[0].block(block).unwrap_or_else(|| zeroes(block));
        assert!(read(&source) == read(&destination), "block {block} differs");
    }
    assert_eq!(report.disk.bytes_reused, expected);
    assert_eq!(report.verification.disk_digest_ok, Some(true));
}

/// A block that is right when it is asked for and spoilt afterwards is found by the verification: what was not sent is compared too.
#[test]
fn what_was_not_sent_is_verified_as_well() {
    let (_world, source, destination) = machines(64, &[8 * BLOCK_BYTES]);
    for block in 0..8 {
        source.disks[0].poke(block, filled(block + 1));
    }
    copy(&source.disks[0], &destination.disks[0], 8);
    source.boot(quiet());
    let disk = Arc::clone(&destination.disks[0]);
    destination.faults.on("restore_state", move |_| {
        disk.poke(5, filled(99));
        Ok(())
    });
    let (report, received) = onto(&source, &destination);
    assert_eq!(report.disk.bytes_reused, 8 * BLOCK_BYTES);
    assert_eq!(report.verification.disk_digest_ok, Some(false), "{}", report.reason);
    assert!(received.expect("it runs there").warning.is_some_and(|warning| warning.contains("block 5")));
}

/// A busy guest: what it writes while the old image is being looked at arrives as ever.
#[test]
fn a_guest_that_writes_meanwhile_loses_nothing() {
    let (world, source, destination) = machines(1024, &[64 * BLOCK_BYTES]);
    source.boot(Workload {
        filled_pages: 300,
        sweep_pages: 200,
        pages_per_ms: 5,
        sweep_blocks: 60,
        blocks_per_16_pages: 4,
        ..Workload::default()
    });
    copy(&source.disks[0], &destination.disks[0], 64);
    let (report, received) = onto(&source, &destination);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination), "{}", report.reason);
    assert_eq!(report.verification.disk_digest_ok, Some(true));
}

/// An image in which there is nothing is not read to its end.
#[test]
fn an_empty_image_is_soon_left_alone() {
    const BLOCKS: u64 = 20 * 1024;
    let (world, source, destination) = machines(64, &[BLOCKS * BLOCK_BYTES]);
    for block in (0..BLOCKS).step_by(1024) {
        source.disks[0].poke(block, filled(block + 1));
    }
    source.boot(quiet());
    let (report, received) = onto(&source, &destination);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination), "{}", report.reason);
    same(&source, &destination, BLOCKS);
    assert_eq!(report.disk.bytes_reused, 0);
    // 17 windows: one more is on its way when the sixteenth turns out to be empty. Verification reads what arrived.
    let looked = destination.faults.calls("disk.submit");
    assert!(looked <= 17 * 1024 + BLOCKS / 1024, "{looked} blocks of an empty image were read");
}
