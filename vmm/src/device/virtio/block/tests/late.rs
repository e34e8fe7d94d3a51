//! Requests that wait for blocks which have not arrived yet.

use std::time::Instant;

use migration::guest::Missing;

use super::*;
use crate::device::virtio::testing::RAM_BYTES;
use crate::memory::Memory;
use crate::memory::uffd::LatePages;

/// A disk that lacks its first block.
fn lacking() -> (Rig, Arc<dyn Missing>) {
    let directory = TempDir::new().unwrap();
    let path = image(&directory);
    let disk = disk(&path, false);
    let mut missing = Bitmap::new(DISK_BYTES / BLOCK_BYTES);
    missing.insert_range(0..1);
    let late = DestinationDisk::expect_blocks(&*disk, &missing).unwrap();
    (Rig::over(ALL, directory, path, disk), late)
}

/// Waits until the device has asked for a block: the request is held from then on.
fn asked(late: &Arc<dyn Missing>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut wanted = Vec::new();
    while wanted.is_empty() {
        assert!(Instant::now() < deadline, "the block was not asked for");
        late.wanted(&mut wanted).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(wanted, [0]);
}

#[test]
fn a_held_request_runs_when_its_block_is_there() {
    let (mut rig, late) = lacking();
    rig.queue(0, 0, 0, &[(BUFFER, 4096, true)]);
    rig.driver.kick(0);
    asked(&late);
    assert!(rig.driver.try_wait_used(0, Duration::from_millis(50)).is_none(), "answered without its block");
    late.fill(0, &pattern(BLOCK_BYTES as usize, 7)).unwrap();
    rig.driver.wait_used(0);
    assert!(rig.driver.get(BUFFER, 4096) == pattern(BLOCK_BYTES as usize, 7)[..4096]);
}

#[test]
fn a_paused_device_starts_nothing_when_a_block_arrives() {
    let (mut rig, late) = lacking();
    rig.driver.put(BUFFER, &[0x55; 4096]);
    rig.queue(0, 0, 0, &[(BUFFER, 4096, true)]);
    rig.driver.kick(0);
    asked(&late);
    rig.block.pause().unwrap();
    late.fill(0, &pattern(BLOCK_BYTES as usize, 7)).unwrap();
    assert!(rig.driver.try_wait_used(0, Duration::from_millis(100)).is_none(), "answered while paused");
    assert_eq!(rig.driver.get(BUFFER, 4096), [0x55; 4096], "guest memory was written while paused");
    rig.block.resume().unwrap();
    rig.driver.wait_used(0);
    assert!(rig.driver.get(BUFFER, 4096) == pattern(BLOCK_BYTES as usize, 7)[..4096]);
}

#[test]
fn a_reset_forgets_what_was_held() {
    let (mut rig, late) = lacking();
    rig.driver.put(BUFFER, &[0x55; 4096]);
    rig.queue(0, 0, 0, &[(BUFFER, 4096, true)]);
    rig.driver.kick(0);
    asked(&late);
    rig.driver.start(ALL);
    late.fill(0, &pattern(BLOCK_BYTES as usize, 7)).unwrap();
    assert!(rig.driver.try_wait_used(0, Duration::from_millis(100)).is_none(), "answered in a queue that never saw it");
    assert_eq!(rig.driver.get(BUFFER, 4096), [0x55; 4096], "memory was written that the driver has taken back");
    // All slots are free again: as many requests as there are slots go through at once.
    for slot in 0..60u64 {
        rig.queue(slot, 1, slot * 8, &[(BUFFER, 4096, false)]);
    }
    rig.driver.kick(0);
    for _ in 0..60 {
        rig.driver.wait_used(0);
    }
}

#[test]
fn a_block_is_stored_while_a_request_waits_for_its_page() {
    let directory = TempDir::new().unwrap();
    let path = image(&directory);
    let disk = disk(&path, false);
    let mut blocks = Bitmap::new(DISK_BYTES / BLOCK_BYTES);
    blocks.insert_range(0..1);
    let late_blocks = DestinationDisk::expect_blocks(&*disk, &blocks).unwrap();
    let memory = Memory::new(RAM_BYTES as u64 >> 20).unwrap();
    let board = Board::with_ram(memory.ram().clone(), 1);
    let block = Block::new(disk, board.wiring()).unwrap();
    let mut driver = Driver::new(board, block.transport(), QUEUE_SIZE);
    driver.start(ALL);
    let mut rig = Rig { _directory: directory, path, block, driver };

    // The guest writes to a block that is here, from a page that is not.
    rig.queue(0, 1, BLOCK_BYTES / 512, &[(BUFFER, 4096, false)]);
    let mut pages = Bitmap::new(memory.pages());
    pages.insert_range(BUFFER / 4096..BUFFER / 4096 + 1);
    memory.forget_pages(&pages).unwrap();
    let Ok(late_pages) = LatePages::new(&memory, &pages) else {
        println!("SKIPPED: no userfaultfd here");
        return;
    };
    rig.driver.kick(0);
    let (deadline, mut wanted) = (Instant::now() + Duration::from_secs(10), Vec::new());
    while wanted.is_empty() {
        assert!(Instant::now() < deadline, "nobody waits for the page");
        Missing::wanted(&late_pages, &mut wanted).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    let (stored, done) = std::sync::mpsc::channel();
    let storing = std::thread::spawn(move || {
        late_blocks.fill(0, &pattern(BLOCK_BYTES as usize, 7)).unwrap();
        stored.send(()).unwrap();
    });
    let stored = done.recv_timeout(Duration::from_secs(10));
    // Whatever came of it, nobody is left waiting.
    late_pages.fill(BUFFER / 4096, &pattern(4096, 3)).unwrap();
    rig.driver.wait_used(0);
    storing.join().unwrap();
    late_pages.finish().unwrap();
    stored.expect("a block waited for a page");
    let image = std::fs::read(&rig.path).unwrap();
    assert!(image[BLOCK_BYTES as usize..][..4096] == pattern(4096, 3)[..]);
    assert!(image[..BLOCK_BYTES as usize] == pattern(BLOCK_BYTES as usize, 7)[..]);
}
