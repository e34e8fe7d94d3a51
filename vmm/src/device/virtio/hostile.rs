//! Guests that break every rule: no panic, no hang, and after a reset the device works as if nothing had happened.

use std::fs::File;
use std::sync::Arc;

use migration::guest::StatePayload;
use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::GuestAddress;

use super::block::{self, Block};
use super::feature;
use super::testing::{Board, DATA, Driver, DriverQueue, F_INDIRECT, F_NEXT, F_WRITE, RAM_BYTES};
use crate::config::{DiskConfig, DiskSource};
use crate::device::{BusDevice, Device};
use crate::disk::{Purpose, RawDisk};
use crate::memory::GuestRam;

struct Rig {
    _directory: TempDir,
    block: Block,
    driver: Driver,
}

fn disk(directory: &TempDir) -> Arc<RawDisk> {
    let path = directory.path().join("image");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let config = DiskConfig { id: "disk0".into(), source: DiskSource::Path(path), read_only: false, shared: false };
    Arc::new(RawDisk::open(&config, Purpose::Use).unwrap())
}

impl Rig {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let board = Board::new(block::QUEUES);
        let block = Block::new(disk(&directory), board.wiring()).unwrap();
        let driver = Driver::new(board, block.transport(), 16);
        Self { _directory: directory, block, driver }
    }

    /// The device can be reset, started and used.
    fn check_alive(&mut self) {
        self.driver.start(feature::COMMON);
        self.driver.put(DATA, &[0; 16]);
        self.driver.put(DATA + 16, &[0xff]);
        let parts = [(DATA, 16, false), (DATA + 0x1000, 512, true), (DATA + 16, 1, true)];
        let head = self.driver.queues[0].add(&self.driver.board.ram, &parts);
        self.driver.kick(0);
        assert_eq!(self.driver.wait_used(0), (head, 513));
        assert_eq!(self.driver.get(DATA + 16, 1), [0]);
    }

    /// All that was kicked has been looked at.
    fn settle(&self) {
        self.block.pause().unwrap();
        self.block.resume().unwrap();
    }
}

#[test]
fn the_device_shows_what_it_is() {
    let mut rig = Rig::new();
    let identity: Vec<u32> = [0, 4, 8].iter().map(|&offset| rig.driver.read(offset)).collect();
    assert_eq!(identity, [0x7472_6976, 2, 2]);
    assert_eq!(rig.driver.offered() & feature::COMMON, feature::COMMON);
    // Capacity in sectors, at any width.
    let mut capacity = [0; 8];
    rig.driver.transport.read(0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), (1 << 20) / 512);
    let mut byte = [9];
    rig.driver.transport.read(0x101, &mut byte);
    assert_eq!(byte, [8]);
    // Past the end, and registers in a width that they do not have.
    for (offset, length) in [(0x13c, 8), (0xfff, 8), (0x00, 2), (0x70, 8), (0x200, 4)] {
        let mut data = vec![7; length];
        rig.driver.transport.read(offset, &mut data);
        assert!(data.iter().all(|&byte| byte == 0), "{offset:#x} {data:?}");
    }
}

#[test]
fn the_status_follows_the_order_of_the_specification() {
    let mut rig = Rig::new();
    let driver = &mut rig.driver;
    // DRIVER_OK and FEATURES_OK before their time.
    driver.write(0x70, 1 | 4 | 8);
    assert_eq!(driver.read(0x70), 1);
    driver.write(0x70, 3);
    // Not without VERSION_1, nor with features that were not offered.
    for (select, bits) in [(0, 0), (0, 1u32 << 24), (2, 1)] {
        driver.write(0x24, select);
        driver.write(0x20, bits);
        driver.write(0x70, 11);
        assert_eq!(driver.read(0x70), 3);
    }
    driver.write(0x70, 0);
    driver.write(0x70, 3);
    driver.write(0x24, 1);
    driver.write(0x20, 1);
    // Queues cannot be touched before the features are settled.
    driver.write(0x44, 1);
    assert_eq!(driver.read(0x44), 0);
    driver.write(0x70, 11);
    assert_eq!(driver.read(0x70), 11);
    driver.write(0x24, 0);
    driver.write(0x20, 0xffff_ffff);
    driver.write(0x70, 15);
    assert_eq!(driver.read(0x70), 15);
    // Bits cannot be taken back; FAILED ends it until a reset.
    driver.write(0x70, 1);
    assert_eq!(driver.read(0x70), 15);
    driver.write(0x70, 128);
    assert_eq!(driver.read(0x70), 128 + 15);
    rig.check_alive();
}

#[test]
fn an_impossible_queue_does_not_become_ready() {
    let mut rig = Rig::new();
    let ram = RAM_BYTES as u64;
    for (size, descriptors, available, used) in [
        (0u32, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (512, 0x1000, 0x2000, 0x3000),
        (65536 + 16, 0x1000, 0x2000, 0x3000),
        (16, 0x1008, 0x2000, 0x3000),
        (16, 0x1000, 0x2001, 0x3000),
        (16, 0x1000, 0x2000, 0x3002),
        (16, ram - 16, 0x2000, 0x3000),
        (16, 0x1000, ram - 2, 0x3000),
        (16, 0x1000, 0x2000, u64::MAX - 3),
        (16, !15u64, 0x2000, 0x3000),
    ] {
        let driver = &mut rig.driver;
        driver.write(0x70, 0);
        driver.write(0x70, 3);
        driver.write(0x24, 1);
        driver.write(0x20, 1);
        driver.write(0x70, 11);
        driver.write(0x38, size);
        for (offset, address) in [(0x80, descriptors), (0x90, available), (0xa0, used)] {
            driver.write(offset, address as u32);
            driver.write(offset + 4, (address >> 32) as u32);
        }
        driver.write(0x44, 1);
        assert_eq!((driver.read(0x44), driver.read(0x70) & 64), (0, 64), "{size} {descriptors:#x}");
        driver.write(0x70, 15);
        driver.kick(0);
    }
    rig.check_alive();
}

#[test]
fn a_live_queue_can_be_stopped() {
    let mut rig = Rig::new();
    rig.check_alive();
    rig.driver.write(0x44, 0);
    assert_eq!(rig.driver.read(0x44), 0);
    rig.driver.queues[0].add(&rig.driver.board.ram, &[(DATA, 16, false), (DATA + 16, 1, true)]);
    rig.driver.kick(0);
    rig.settle();
    assert_eq!(rig.driver.queues[0].used(&rig.driver.board.ram), None);
    rig.check_alive();
}

/// Makes a chain available and expects the device to give up.
fn breaks(rig: &mut Rig, what: &str, build: impl FnOnce(&mut DriverQueue, &GuestRam)) {
    rig.driver.start(feature::COMMON);
    let Driver { board, queues, .. } = &mut rig.driver;
    build(&mut queues[0], &board.ram);
    rig.driver.kick(0);
    rig.driver.wait_needs_reset();
    assert!(rig.driver.queues[0].used(&rig.driver.board.ram).is_none(), "{what}");
    rig.check_alive();
}

#[test]
fn each_broken_chain_asks_for_a_reset() {
    let mut rig = Rig::new();
    let end = RAM_BYTES as u64;
    breaks(&mut rig, "a loop", |queue, ram| {
        for index in 0..16 {
            queue.write_descriptor(ram, index, DATA, 16, F_NEXT, (index + 1) % 16);
        }
        queue.offer(ram, 0);
    });
    breaks(&mut rig, "a next index past the table", |queue, ram| {
        queue.write_descriptor(ram, 0, DATA, 16, F_NEXT, 16);
        queue.offer(ram, 0);
    });
    breaks(&mut rig, "a head past the table", |queue, ram| queue.offer(ram, 16));
    breaks(&mut rig, "an available index far ahead", |queue, ram| {
        queue.available = 99;
        queue.offer(ram, 0);
    });
    for (gpa, bytes) in [(end - 8, 16), (end, 16), (u64::MAX - 8, 16), (0xd000_0000, 16)] {
        breaks(&mut rig, "memory that is no RAM", |queue, ram| {
            queue.add(ram, &[(gpa, bytes, false), (DATA, 1, true)]);
        });
    }
    breaks(&mut rig, "readable after writable", |queue, ram| {
        queue.add(ram, &[(DATA, 16, false), (DATA, 1, true), (DATA, 16, false)]);
    });
    breaks(&mut rig, "no status byte", |queue, ram| {
        queue.add(ram, &[(DATA, 16, false)]);
    });
    breaks(&mut rig, "no room in the status byte", |queue, ram| {
        queue.add(ram, &[(DATA, 16, false), (DATA, 0, true)]);
    });
    breaks(&mut rig, "half a header", |queue, ram| {
        queue.add(ram, &[(DATA, 15, false), (DATA, 1, true)]);
    });
    breaks(&mut rig, "an indirect table within an indirect table", |queue, ram| {
        queue.write_descriptor(ram, 0, queue.descriptors(), 256, F_INDIRECT, 0);
        queue.offer(ram, 0);
    });
    breaks(&mut rig, "an indirect table of odd length", |queue, ram| {
        queue.write_descriptor(ram, 0, DATA, 17, F_INDIRECT, 0);
        queue.offer(ram, 0);
    });
    breaks(&mut rig, "more segments than any driver uses", |queue, ram| {
        let table = DATA + 0x10_0000;
        for index in 0..2000u64 {
            vm_memory::Bytes::write_obj(ram, DATA, GuestAddress(table + index * 16)).unwrap();
            vm_memory::Bytes::write_obj(ram, 1u32, GuestAddress(table + index * 16 + 8)).unwrap();
            vm_memory::Bytes::write_obj(ram, F_NEXT, GuestAddress(table + index * 16 + 12)).unwrap();
            vm_memory::Bytes::write_obj(ram, index as u16 + 1, GuestAddress(table + index * 16 + 14)).unwrap();
        }
        queue.write_descriptor(ram, 0, table, 2000 * 16, F_INDIRECT, 0);
        queue.offer(ram, 0);
    });
    breaks(&mut rig, "a request with more empty descriptors than any driver uses", |queue, ram| {
        let table = DATA + 0x10_0000;
        for index in 0..2000u64 {
            let (bytes, flags) = match index {
                0 => (16u32, F_NEXT),
                1999 => (1, F_WRITE),
                _ => (0, F_NEXT),
            };
            vm_memory::Bytes::write_obj(ram, bytes, GuestAddress(table + index * 16 + 8)).unwrap();
            vm_memory::Bytes::write_obj(ram, flags, GuestAddress(table + index * 16 + 12)).unwrap();
        }
        queue.write_descriptor(ram, 0, table, 2000 * 16, F_INDIRECT, 0);
        queue.offer(ram, 0);
    });
}

#[test]
fn an_indirect_chain_is_a_chain() {
    let mut rig = Rig::new();
    rig.driver.start(feature::COMMON);
    rig.driver.put(DATA, &[0; 16]);
    let Driver { board, queues, .. } = &mut rig.driver;
    let table = DATA + 0x2000;
    let parts = [(DATA, 16u32, F_NEXT), (DATA + 0x1000, 1024, F_NEXT | F_WRITE), (DATA + 16, 1, F_WRITE)];
    for (index, (gpa, bytes, flags)) in parts.into_iter().enumerate() {
        let at = table + index as u64 * 16;
        let next = (index as u64 + 1) << 48;
        let rest = u64::from(bytes) | u64::from(flags) << 32 | next;
        vm_memory::Bytes::write_obj(&board.ram, gpa, GuestAddress(at)).unwrap();
        vm_memory::Bytes::write_obj(&board.ram, rest, GuestAddress(at + 8)).unwrap();
    }
    queues[0].write_descriptor(&board.ram, 5, table, 48, F_INDIRECT, 0);
    queues[0].offer(&board.ram, 5);
    rig.driver.kick(0);
    assert_eq!(rig.driver.wait_used(0), (5, 1025));
}

fn register() -> impl Strategy<Value = (u64, u32)> {
    let known =
        [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xac, 0xc0, 0x100];
    let offset = prop_oneof![8 => proptest::sample::select(known.to_vec()), 1 => 0u64..0x1100];
    let value = prop_oneof![
        Just(0),
        Just(1),
        proptest::sample::select(vec![3u32, 11, 15, 64, 128, 16, 256, 0x10_0000, 0x10_2000, 0x10_3000]),
        any::<u32>(),
    ];
    (offset, value)
}

#[derive(Clone, Debug)]
struct Descriptor(u64, u32, u16, u16);

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let end = RAM_BYTES as u64;
    let gpa = prop_oneof![
        4 => DATA..DATA + 0x4000,
        2 => Just(0x10_0000),
        1 => end - 600..end + 16,
        1 => any::<u64>(),
    ];
    let bytes = prop_oneof![Just(1u32), Just(16), Just(512), Just(4096), 0u32..70_000, any::<u32>()];
    let flags = prop_oneof![Just(0), Just(F_NEXT), Just(F_NEXT | F_WRITE), Just(F_WRITE), Just(F_INDIRECT), 0u16..8];
    (gpa, bytes, flags, 0u16..18).prop_map(|(gpa, bytes, flags, next)| Descriptor(gpa, bytes, flags, next))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_writes_to_registers_are_survived(writes in proptest::collection::vec(register(), 1..200), width in 0usize..9) {
        let mut rig = Rig::new();
        for (offset, value) in &writes {
            rig.driver.write(*offset, *value);
            rig.driver.read(*offset);
            rig.driver.transport.write(*offset, &vec![0xff; width]);
            rig.driver.transport.read(*offset, &mut vec![0; width]);
        }
        rig.settle();
        rig.check_alive();
    }

    #[test]
    fn any_chains_are_survived(
        table in proptest::collection::vec(descriptor(), 16),
        heads in proptest::collection::vec(0u16..18, 1..16),
        kinds in proptest::collection::vec(prop_oneof![Just(0u32), Just(1), Just(4), Just(8), Just(11), Just(13), any::<u32>()], 8),
        ahead in prop_oneof![9 => Just(0u16), 1 => any::<u16>()],
    ) {
        let mut rig = Rig::new();
        rig.driver.start(feature::COMMON);
        for (index, kind) in kinds.iter().enumerate() {
            rig.driver.put(DATA + index as u64 * 16, &u64::from(*kind).to_le_bytes());
        }
        let Driver { board, queues, .. } = &mut rig.driver;
        for (index, &Descriptor(gpa, bytes, flags, next)) in table.iter().enumerate() {
            queues[0].write_descriptor(&board.ram, index as u16, gpa, bytes, flags, next);
        }
        queues[0].available = queues[0].available.wrapping_add(ahead);
        for &head in &heads {
            queues[0].offer(&board.ram, head);
        }
        rig.driver.kick(0);
        rig.settle();
        rig.check_alive();
    }

    #[test]
    fn any_saved_state_is_restored_or_refused(flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6)) {
        let mut rig = Rig::new();
        rig.check_alive();
        rig.block.pause().unwrap();
        let mut state: StatePayload = rig.block.save().unwrap();
        for (at, value) in &flips {
            let at = at.index(state.bytes.len());
            state.bytes[at] = *value;
        }
        let Rig { _directory: directory, block, driver } = rig;
        let Driver { board, transport, .. } = driver;
        drop((block, transport));
        let board = Board::with_ram(board.ram, block::QUEUES);
        if let Ok(block) = Block::restore(disk(&directory), board.wiring(), &state) {
            block.resume().unwrap();
            let driver = Driver::new(board, block.transport(), 16);
            let mut rig = Rig { _directory: directory, block, driver };
            rig.driver.kick(0);
            rig.settle();
            rig.check_alive();
        }
    }
}
