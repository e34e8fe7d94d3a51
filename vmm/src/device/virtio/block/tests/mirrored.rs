//! Answers to writes wait while a migration mirrors them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::guest::SourceDisk;
use migration::mirror::{Bell, HOLD_MOST};

use super::*;

/// A write that is done and not answered.
fn waiting(rig: &mut Rig, bell: &Arc<Bell>) {
    assert!(SourceDisk::start_mirroring(&**rig.block.disk(), bell).unwrap());
    rig.driver.put(BUFFER, &pattern(4096, 1));
    rig.queue(0, 1, 0, &[(BUFFER, 4096, false)]);
    rig.driver.kick(0);
    // Rung when it is done.
    bell.wait(Duration::from_secs(10));
    assert_eq!(rig.content(0, 4096), pattern(4096, 1));
    assert_eq!(rig.driver.try_wait_used(0, Duration::from_millis(20)), None);
}

#[test]
fn a_write_is_answered_when_it_has_arrived_and_a_read_at_once() {
    let (mut rig, bell) = (Rig::new(ALL), Arc::new(Bell::default()));
    rig.block.disk().start_dirty_tracking();
    waiting(&mut rig, &bell);
    let disk = Arc::clone(rig.block.disk());
    // What arrives now was collected before.
    SourceDisk::mirrored(&*disk);
    rig.queue(1, 0, 0, &[(BUFFER + 0x1000, 512, true)]);
    rig.driver.kick(0);
    let (read, _) = rig.driver.wait_used(0);
    let mut dirty = Bitmap::new(DISK_BYTES / BLOCK_BYTES);
    SourceDisk::collect_dirty(&*disk, &mut dirty).unwrap();
    assert!(dirty.contains(0));
    assert_eq!(rig.driver.try_wait_used(0, Duration::from_millis(20)), None);
    SourceDisk::mirrored(&*disk);
    let (write, _) = rig.driver.wait_used(0);
    assert_ne!(write, read);
    assert_eq!(rig.driver.get(STATUS, 1), [0]);
}

#[test]
fn a_machine_that_pauses_has_answered_and_so_has_one_whose_migration_ends() {
    let (mut rig, bell) = (Rig::new(ALL), Arc::new(Bell::default()));
    waiting(&mut rig, &bell);
    rig.block.pause().unwrap();
    assert!(rig.driver.try_wait_used(0, Duration::ZERO).is_some());
    rig.block.resume().unwrap();
    waiting(&mut rig, &bell);
    SourceDisk::stop_mirroring(&**rig.block.disk());
    rig.driver.wait_used(0);
    assert_eq!(rig.write(0, &[1; 512]), 0, "and nothing waits from there on");
}

#[test]
fn a_link_that_has_gone_quiet_does_not_look_like_a_dead_disk() {
    let (mut rig, bell) = (Rig::new(ALL), Arc::new(Bell::default()));
    waiting(&mut rig, &bell);
    let start = Instant::now();
    rig.driver.wait_used(0);
    assert!(start.elapsed() < HOLD_MOST * 3, "{:?}", start.elapsed());
}
