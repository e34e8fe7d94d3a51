//! A disk that becomes larger under its driver.

use super::*;
use crate::device::BusDevice;
use crate::disk::DiskError;

const LARGER: u64 = 2 * DISK_BYTES;
const FIRST_NEW_SECTOR: u64 = DISK_BYTES / 512;
/// Registers of the transport (virtio 1.2, section 4.2.2).
const INTERRUPT_STATUS: u64 = 0x60;
const CONFIG_GENERATION: u64 = 0xfc;
const CONFIG: u64 = 0x100;
const CONFIG_CHANGE: u32 = 2;

fn capacity(rig: &mut Rig) -> u64 {
    let mut bytes = [0; 8];
    rig.driver.transport.read(CONFIG, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn the_driver_is_told_and_the_new_sectors_work() {
    let mut rig = Rig::new(ALL);
    assert_eq!(rig.write(FIRST_NEW_SECTOR, &pattern(512, 1)), 1, "past the end");
    let generation = rig.driver.read(CONFIG_GENERATION);
    rig.block.grow(LARGER).unwrap();
    assert!(rig.driver.wait_interrupt(Duration::from_secs(10)));
    assert_eq!(rig.driver.read(INTERRUPT_STATUS) & CONFIG_CHANGE, CONFIG_CHANGE);
    assert_ne!(rig.driver.read(CONFIG_GENERATION), generation);
    assert_eq!(capacity(&mut rig), LARGER / 512);
    let data = pattern(4096, 7);
    assert_eq!(rig.write(LARGER / 512 - 8, &data), 0);
    assert!(rig.content(LARGER - 4096, data.len()) == data);
    assert_eq!(rig.write(LARGER / 512, &pattern(512, 1)), 1, "past the new end");
    // A size that it has is none that changes.
    let generation = rig.driver.read(CONFIG_GENERATION);
    rig.block.grow(LARGER).unwrap();
    assert_eq!(rig.driver.read(CONFIG_GENERATION), generation);
}

#[test]
fn a_paused_device_tells_when_it_goes_on_and_a_restored_one_has_the_new_size() {
    let mut rig = Rig::new(ALL);
    rig.block.pause().unwrap();
    rig.block.grow(LARGER).unwrap();
    assert!(!rig.driver.wait_interrupt(Duration::from_millis(20)), "nothing moves while it is paused");
    let state = rig.block.save().unwrap();
    rig.block.resume().unwrap();
    assert!(rig.driver.wait_interrupt(Duration::from_secs(10)));
    assert_eq!(rig.driver.read(INTERRUPT_STATUS) & CONFIG_CHANGE, CONFIG_CHANGE);

    let mut rig = rig.restored(&state);
    assert_eq!(capacity(&mut rig), LARGER / 512);
    rig.block.resume().unwrap();
    assert!(rig.driver.wait_interrupt(Duration::from_secs(10)), "its driver had not heard of it yet");
    assert_eq!(rig.write(FIRST_NEW_SECTOR, &pattern(512, 1)), 0);
}

#[test]
fn writes_to_new_sectors_are_tracked() {
    let mut rig = Rig::new(ALL);
    // A migration before it, which ended.
    rig.block.disk().start_dirty_tracking();
    SourceDisk::stop_dirty_tracking(&**rig.block.disk()).unwrap();
    rig.block.grow(LARGER).unwrap();
    rig.block.disk().start_dirty_tracking();
    assert_eq!(rig.write(LARGER / 512 - 1, &pattern(512, 1)), 0);
    let mut dirty = Bitmap::new(LARGER / BLOCK_BYTES);
    rig.block.disk().tracker().collect(&mut dirty);
    assert!(dirty.contains(LARGER / BLOCK_BYTES - 1) && dirty.count() == 1);
}

#[test]
fn a_size_that_cannot_be_is_refused_in_words_and_nothing_changes() {
    let mut rig = Rig::new(ALL);
    let refused = |rig: &Rig, bytes| rig.block.grow(bytes).unwrap_err();
    assert!(matches!(refused(&rig, DISK_BYTES - 512), DiskError::Shrink { .. }));
    assert!(matches!(refused(&rig, DISK_BYTES + 1), DiskError::Size { .. }));
    assert!(matches!(refused(&rig, 0), DiskError::Size { .. }));
    // Somebody has enlarged the file already, to more than is asked for.
    File::options().write(true).open(&rig.path).unwrap().set_len(LARGER).unwrap();
    assert!(matches!(refused(&rig, LARGER - 512), DiskError::Unlike { found: LARGER, .. }));
    rig.block.disk().start_dirty_tracking();
    let moving = refused(&rig, LARGER);
    assert!(matches!(moving, DiskError::Moving(_)) && moving.to_string().contains("cancel it"), "{moving}");
    SourceDisk::stop_dirty_tracking(&**rig.block.disk()).unwrap();
    assert_eq!(capacity(&mut rig), DISK_BYTES / 512);
    assert_eq!(rig.driver.read(INTERRUPT_STATUS), 0);
    rig.block.grow(LARGER).unwrap();

    // What the guest may only read is enlarged by somebody else, or not at all.
    let rig = Rig::with(common::COMMON, TempDir::new().unwrap(), true);
    assert!(matches!(refused(&rig, LARGER), DiskError::Unlike { found: DISK_BYTES, .. }));
    File::options().write(true).open(&rig.path).unwrap().set_len(LARGER).unwrap();
    rig.block.grow(LARGER).unwrap();
}
