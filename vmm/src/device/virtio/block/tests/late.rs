//! Requests that wait for blocks which have not arrived yet.

use std::time::Instant;

use migration::guest::Missing;

use super::*;

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
