//! The balloon, driven by a driver that does what it should.

mod hostile;
mod model;

use std::sync::Arc;

use migration::guest::StatePayload;
use migration::page::SharedBitmap;
use vm_memory::{Bytes, GuestAddress};

use super::{Balloon, QUEUES, feature, field, queue};
use crate::config::BalloonConfig;
use crate::device::virtio::feature as common;
use crate::device::virtio::testing::{Board, DATA, Driver, RAM_BYTES};
use crate::device::{BusDevice, Device};
use crate::memory::Memory;

const PAGE: u64 = 4096;
/// Where the tests have pages to give away.
const GIFTS: u64 = 8 << 20;
const ALL: u64 = common::COMMON
    | feature::STATISTICS
    | feature::DEFLATE_ON_OOM
    | feature::HINTS
    | feature::POISON
    | feature::REPORTS;

pub struct Rig {
    pub memory: Memory,
    pub balloon: Balloon,
    pub driver: Driver,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(&BalloonConfig::default())
    }

    pub fn with(config: &BalloonConfig) -> Self {
        let memory = Memory::new(RAM_BYTES as u64 >> 20).unwrap();
        let board = Board::with_ram(memory.ram().clone(), QUEUES);
        let balloon = Balloon::new(config, &memory, board.wiring()).unwrap();
        let driver = Driver::new(board, balloon.transport(), 16);
        Self { memory, balloon, driver }
    }

    pub fn started() -> Self {
        let mut rig = Self::new();
        rig.driver.start(ALL);
        rig
    }

    pub fn restored(self, state: &StatePayload) -> Self {
        let Self { memory, driver: Driver { board, queues, transport }, balloon } = self;
        drop((balloon, transport));
        let board = Board { ram: board.ram, interrupt: board.interrupt, notify: Board::new(QUEUES).notify };
        let balloon = Balloon::restore(&BalloonConfig::default(), &memory, board.wiring(), state).unwrap();
        let transport = balloon.transport();
        Self { memory, balloon, driver: Driver { board, transport, queues } }
    }

    pub fn config(&mut self, field: usize) -> u32 {
        self.driver.read(0x100 + field as u64)
    }

    /// Makes a chain available and waits until it has come back.
    pub fn give(&mut self, queue: usize, parts: &[(u64, u32, bool)]) {
        let head = self.driver.queues[queue].add(&self.driver.board.ram, parts);
        self.driver.kick(queue);
        assert_eq!(self.driver.wait_used(queue), (head, 0));
    }

    pub fn frames(&mut self, queue: usize, frames: &[u32]) {
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.to_le_bytes()).collect();
        self.driver.put(DATA, &bytes);
        self.give(queue, &[(DATA, bytes.len() as u32, false)]);
    }

    pub fn say(&mut self, id: u32) {
        self.driver.put(DATA, &id.to_le_bytes());
        self.give(queue::HINTS, &[(DATA, 4, false)]);
    }

    fn fill(&self, pages: u64) {
        self.memory.ram().write_slice(&vec![7; (pages * PAGE) as usize], GuestAddress(GIFTS)).unwrap();
        for page in 0..pages {
            self.driver.board.take_dirty(GIFTS + page * PAGE);
        }
    }

    /// The first byte of each page, and whether it was marked.
    fn pages(&self, pages: u64) -> Vec<(u8, bool)> {
        let one = |page| {
            let gpa = GIFTS + page * PAGE;
            (self.memory.ram().read_obj(GuestAddress(gpa)).unwrap(), self.driver.board.take_dirty(gpa))
        };
        (0..pages).map(one).collect()
    }

    fn config_interrupt(&mut self) {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while self.driver.read(0x60) & 2 == 0 {
            assert!(std::time::Instant::now() < end, "no configuration interrupt");
            self.driver.wait_interrupt(std::time::Duration::from_millis(100));
        }
        self.driver.write(0x64, 3);
    }
}

const KEPT: (u8, bool) = (7, false);
const GIVEN: (u8, bool) = (0, true);

#[test]
fn the_driver_is_told_the_target_and_tells_what_it_gave() {
    let mut rig = Rig::with(&BalloonConfig { target_mib: 3, ..BalloonConfig::default() });
    assert_eq!(rig.driver.read(8), 5);
    assert_eq!(rig.driver.offered() & ALL, ALL);
    assert_eq!(rig.config(field::TARGET), 768);
    // Not before the driver has introduced itself.
    rig.driver.write(0x100 + field::ACTUAL as u64, 9);
    assert_eq!(rig.config(field::ACTUAL), 0);
    rig.driver.start(ALL);
    rig.driver.write(0x100 + field::ACTUAL as u64, 700);
    rig.driver.transport.write(0x100 + field::ACTUAL as u64 + 1, &[1]);
    assert_eq!(rig.config(field::ACTUAL), 700 & !0xff00 | 0x100);
    // What is not its own, and what reaches over the end of a field.
    for offset in [field::TARGET, field::COMMAND, 16, 17, 0xe00] {
        rig.driver.write(0x100 + offset as u64, 0xffff_ffff);
    }
    rig.driver.transport.write(0x100 + field::ACTUAL as u64, &[0xff; 8]);
    assert_eq!((rig.config(field::TARGET), rig.config(field::COMMAND)), (768, 0));
    assert_eq!(rig.config(field::ACTUAL), 700 & !0xff00 | 0x100);

    rig.balloon.set_target(5).unwrap();
    rig.config_interrupt();
    assert_eq!(rig.config(field::TARGET), 1280);
    let info = rig.balloon.info().unwrap();
    assert_eq!((info.target_bytes, info.actual_bytes), (5 << 20, (700 & !0xff00 | 0x100) * PAGE));
    // A reset forgets what the old driver said.
    rig.driver.start(ALL);
    assert_eq!((rig.config(field::TARGET), rig.config(field::ACTUAL)), (1280, 0));
}

#[test]
fn reporting_and_deflating_by_itself_can_be_left_out() {
    let config = BalloonConfig { deflate_on_oom: false, free_page_reporting: false, ..BalloonConfig::default() };
    let mut rig = Rig::with(&config);
    assert_eq!(rig.driver.offered() & (feature::DEFLATE_ON_OOM | feature::REPORTS), 0);
    assert_ne!(rig.driver.offered() & feature::HINTS, 0);
}

#[test]
fn inflated_pages_leave_the_host_and_are_marked() {
    let mut rig = Rig::started();
    rig.fill(8);
    let first = (GIFTS / PAGE) as u32;
    // In any order, twice, and some that are no RAM.
    rig.frames(queue::INFLATE, &[first + 3, first + 1, first + 3, 0xffff_ffff, first + 4, 0xd_0000, 4096]);
    assert_eq!(rig.pages(8), [KEPT, GIVEN, KEPT, GIVEN, GIVEN, KEPT, KEPT, KEPT]);
    assert_eq!(rig.balloon.info().unwrap().inflated_bytes, 3 * PAGE);
    let resident = |rig: &Rig| crate::memory::Usage::now(Some(&rig.memory)).ram_bytes;
    let before = resident(&rig);
    rig.frames(queue::INFLATE, &[first, first + 2, first + 5]);
    assert_eq!(before - resident(&rig), 3 * PAGE);
    rig.frames(queue::DEFLATE, &[first + 3, first + 1]);
    rig.memory.ram().write_obj(5u8, GuestAddress(GIFTS + PAGE)).unwrap();
    assert_eq!(rig.pages(2)[1], (5, true));
    assert_eq!(rig.driver.read(0x70) & 64, 0);
}

#[test]
fn reported_pages_go_at_once_unless_the_guest_expects_something_in_them() {
    let mut rig = Rig::started();
    rig.fill(16);
    // Only the whole pages inside.
    let parts = [(GIFTS + PAGE, 2 * PAGE as u32, true), (GIFTS + 5 * PAGE + 1, 3 * PAGE as u32, true)];
    rig.give(queue::REPORTS, &parts);
    let expected: Vec<_> = (0..16).map(|page| if [1, 2, 6, 7].contains(&page) { GIVEN } else { KEPT }).collect();
    assert_eq!(rig.pages(16), expected);
    assert_eq!(rig.balloon.info().unwrap().reported_bytes, 4 * PAGE);
    rig.driver.write(0x100 + field::POISON as u64, 0xaaaa_aaaa);
    rig.give(queue::REPORTS, &[(GIFTS + 8 * PAGE, PAGE as u32, true)]);
    assert_eq!(rig.pages(9)[8], KEPT);
    assert!(!rig.balloon.start_hints(Arc::new(SharedBitmap::new(4096))).unwrap());
}

#[test]
fn hints_count_in_their_session_alone_and_change_nothing() {
    let mut rig = Rig::started();
    rig.fill(8);
    let hint = |rig: &mut Rig, page: u64| rig.give(queue::HINTS, &[(GIFTS + page * PAGE, PAGE as u32, true)]);
    let at = |free: &SharedBitmap, page: u64| free.contains(GIFTS / PAGE + page);
    hint(&mut rig, 0);
    let free = Arc::new(SharedBitmap::new(rig.memory.pages()));
    assert!(rig.balloon.start_hints(Arc::clone(&free)).unwrap());
    rig.config_interrupt();
    let id = rig.config(field::COMMAND);
    // From before the guest has seen the id.
    hint(&mut rig, 1);
    assert_eq!(free.count(), 0);
    assert!(!rig.balloon.hints_are_over().unwrap());
    rig.say(id);
    hint(&mut rig, 2);
    hint(&mut rig, 3);
    assert!(at(&free, 2) && at(&free, 3) && free.count() == 2);
    assert!(!rig.balloon.hints_are_over().unwrap());
    rig.say(0);
    assert!(rig.balloon.hints_are_over().unwrap());
    hint(&mut rig, 4);
    assert_eq!(free.count(), 2);

    // The next session, with hints of the first one still on their way.
    let next = Arc::new(SharedBitmap::new(rig.memory.pages()));
    rig.balloon.stop_hints(false).unwrap();
    assert_eq!(rig.config(field::COMMAND), 0);
    assert!(rig.balloon.start_hints(Arc::clone(&next)).unwrap());
    rig.say(id);
    hint(&mut rig, 5);
    let second = rig.config(field::COMMAND);
    assert_ne!(second, id);
    rig.say(second);
    hint(&mut rig, 6);
    rig.balloon.stop_hints(true).unwrap();
    hint(&mut rig, 7);
    assert!(at(&next, 6) && next.count() == 1 && free.count() == 2);
    assert_eq!(rig.config(field::COMMAND), 1);
    assert_eq!(rig.balloon.info().unwrap().hinted_bytes, 3 * PAGE);
    assert_eq!(rig.pages(8), [KEPT; 8]);
}

#[test]
fn a_driver_without_hints_is_not_asked() {
    let mut rig = Rig::new();
    let free = || Arc::new(SharedBitmap::new(4096));
    assert!(!rig.balloon.start_hints(free()).unwrap());
    rig.driver.start(ALL & !feature::HINTS);
    assert!(!rig.balloon.start_hints(free()).unwrap());
    rig.balloon.stop_hints(true).unwrap();
    assert_eq!(rig.config(field::COMMAND), 0);
}

fn figures(rig: &mut Rig, free: u64) {
    rig.driver.put(DATA + 64, &[&[4u8, 0][..], &free.to_le_bytes()].concat());
}

#[test]
fn figures_are_asked_for_and_survive_a_pause() {
    let mut rig = Rig::started();
    figures(&mut rig, 100);
    let free = |rig: &Rig| rig.balloon.info().unwrap().statistics.free_bytes;
    let head = rig.driver.queues[queue::STATISTICS].add(&rig.driver.board.ram, &[(DATA + 64, 10, false)]);
    rig.driver.kick(queue::STATISTICS);
    // The list stays with the device until somebody asks; pausing gives it back, resuming takes it again.
    rig.balloon.pause().unwrap();
    rig.balloon.resume().unwrap();
    assert_eq!(free(&rig), Some(100));
    assert_eq!(rig.driver.wait_used(queue::STATISTICS), (head, 0));
    figures(&mut rig, 200);
    let head = rig.driver.queues[queue::STATISTICS].add(&rig.driver.board.ram, &[(DATA + 64, 10, false)]);
    rig.driver.kick(queue::STATISTICS);
    rig.balloon.pause().unwrap();
    let state = rig.balloon.save().unwrap();
    let mut rig = rig.restored(&state);
    rig.balloon.resume().unwrap();
    assert_eq!(free(&rig), Some(200));
    assert_eq!(rig.driver.wait_used(queue::STATISTICS), (head, 0));
}

#[test]
fn a_saved_balloon_goes_on_and_its_ids_do_not_repeat() {
    let mut rig = Rig::started();
    rig.balloon.start_hints(Arc::new(SharedBitmap::new(4096))).unwrap();
    let id = rig.config(field::COMMAND);
    rig.driver.write(0x100 + field::ACTUAL as u64, 99);
    rig.balloon.pause().unwrap();
    // Neither reaches the guest here; the next one to run it tells it.
    rig.driver.write(0x64, 3);
    rig.balloon.set_target(2).unwrap();
    rig.balloon.stop_hints(true).unwrap();
    assert_eq!(rig.driver.read(0x60), 0);
    let first = (GIFTS / PAGE) as u32;
    rig.fill(2);
    rig.driver.put(DATA, &first.to_le_bytes());
    let head = rig.driver.queues[queue::INFLATE].add(&rig.driver.board.ram, &[(DATA, 4, false)]);
    rig.driver.kick(queue::INFLATE);
    let state = rig.balloon.save().unwrap();
    assert_eq!(rig.balloon.save().unwrap(), state);
    assert_eq!(rig.pages(2), [KEPT; 2]);

    let mut rig = rig.restored(&state);
    assert_eq!(rig.pages(2), [KEPT; 2], "a restored device is paused");
    rig.balloon.resume().unwrap();
    rig.config_interrupt();
    assert_eq!([field::TARGET, field::ACTUAL, field::COMMAND].map(|field| rig.config(field)), [512, 99, 1]);
    assert_eq!(rig.driver.wait_used(queue::INFLATE), (head, 0));
    assert_eq!(rig.pages(2), [GIVEN, KEPT]);
    rig.balloon.start_hints(Arc::new(SharedBitmap::new(4096))).unwrap();
    assert_ne!(rig.config(field::COMMAND), id);

    let slot = super::slot();
    let mut saved: super::state::BalloonStateV1 = crate::device::state::decode(&slot, &state).unwrap();
    saved.target = 4097;
    let impossible = crate::device::state::encode(slot, &saved).unwrap();
    let board = Board::with_ram(rig.memory.ram().clone(), QUEUES);
    let refused = Balloon::restore(&BalloonConfig::default(), &rig.memory, board.wiring(), &impossible);
    assert!(refused.is_err_and(|error| error.to_string().contains("4097 pages")));
}
