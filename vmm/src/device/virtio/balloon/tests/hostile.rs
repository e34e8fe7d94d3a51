//! Guests that break every rule: no panic, no hang, and after a reset the balloon works as if nothing had happened.

use proptest::prelude::*;

use super::*;
use crate::device::virtio::testing::{F_INDIRECT, F_NEXT, F_WRITE};

impl Rig {
    fn check_alive(&mut self) {
        self.driver.start(ALL);
        self.fill(2);
        self.frames(queue::INFLATE, &[(GIFTS / PAGE) as u32]);
        assert_eq!(self.pages(2), [GIVEN, KEPT]);
        self.give(queue::REPORTS, &[(GIFTS + PAGE, PAGE as u32, true)]);
        assert_eq!(self.pages(2)[1], GIVEN);
    }

    fn settle(&self) {
        self.balloon.pause().unwrap();
        self.balloon.resume().unwrap();
    }

    fn breaks(&mut self, queue: usize, parts: &[(u64, u32, bool)]) {
        self.driver.start(ALL);
        self.driver.queues[queue].add(&self.driver.board.ram, parts);
        self.driver.kick(queue);
        self.driver.wait_needs_reset();
        self.check_alive();
    }
}

#[test]
fn what_would_keep_it_busy_for_ever_is_refused() {
    let mut rig = Rig::new();
    let (end, all) = (RAM_BYTES as u64, RAM_BYTES as u32);
    // More frames than anybody sends; more memory than there is, as it overlaps; memory that is no RAM.
    rig.breaks(queue::INFLATE, &[(DATA, 256 << 10, false), (DATA, 4, false)]);
    for index in [queue::REPORTS, queue::HINTS] {
        rig.breaks(index, &[(0, all, true), (0, PAGE as u32, true)]);
        rig.breaks(index, &[(end - PAGE, 2 * PAGE as u32, true)]);
    }
    rig.breaks(queue::STATISTICS, &[(end, 10, false)]);
}

#[test]
fn the_rings_themselves_can_be_given_away() {
    let mut rig = Rig::started();
    let ring = rig.driver.queues[queue::INFLATE].descriptors();
    rig.driver.put(DATA, &((ring / PAGE) as u32).to_le_bytes());
    rig.driver.queues[queue::INFLATE].add(&rig.driver.board.ram, &[(DATA, 4, false)]);
    rig.driver.kick(queue::INFLATE);
    rig.settle();
    rig.driver.queues[queue::REPORTS].add(&rig.driver.board.ram, &[(0, RAM_BYTES as u32, true)]);
    rig.driver.kick(queue::REPORTS);
    rig.settle();
    rig.check_alive();
}

#[test]
fn a_driver_that_offers_more_than_one_list_of_figures_gets_the_others_back() {
    let mut rig = Rig::started();
    let ram = rig.driver.board.ram.clone();
    let heads = [0, 1, 2].map(|index| rig.driver.queues[queue::STATISTICS].add(&ram, &[(DATA + index, 10, false)]));
    rig.driver.kick(queue::STATISTICS);
    assert_eq!(rig.driver.wait_used(queue::STATISTICS), (heads[0], 0));
    assert_eq!(rig.driver.wait_used(queue::STATISTICS), (heads[1], 0));
    rig.balloon.info().unwrap();
    assert_eq!(rig.driver.wait_used(queue::STATISTICS), (heads[2], 0));
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let end = RAM_BYTES as u64;
    let gpa = prop_oneof![4 => DATA..DATA + 0x4000, 2 => GIFTS..GIFTS + 0x10_0000, 1 => end - 600..end + 16, 1 => any::<u64>()];
    let bytes = prop_oneof![Just(4u32), Just(10), Just(4096), 0u32..0x20_0000, any::<u32>()];
    let flags = prop_oneof![Just(0), Just(F_NEXT), Just(F_NEXT | F_WRITE), Just(F_WRITE), Just(F_INDIRECT), 0u16..8];
    (gpa, bytes, flags, 0u16..18)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_chains_are_survived(
        table in proptest::collection::vec(descriptor(), 16),
        heads in proptest::collection::vec((0..QUEUES, 0u16..18), 1..24),
        words in proptest::collection::vec(prop_oneof![Just(0u32), Just(0x8000_0000), 0u32..8192, any::<u32>()], 64),
        ahead in prop_oneof![9 => Just(0u16), 1 => any::<u16>()],
        hinting in any::<bool>(),
    ) {
        let mut rig = Rig::started();
        let free = Arc::new(SharedBitmap::new(rig.memory.pages()));
        if hinting {
            rig.balloon.start_hints(Arc::clone(&free)).unwrap();
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        rig.driver.put(DATA, &bytes);
        let Driver { board, queues, .. } = &mut rig.driver;
        for queue in queues.iter_mut() {
            for (index, &(gpa, bytes, flags, next)) in (0u16..).zip(&table) {
                queue.write_descriptor(&board.ram, index, gpa, bytes, flags, next);
            }
            queue.available = queue.available.wrapping_add(ahead);
        }
        for &(queue, head) in &heads {
            queues[queue].offer(&board.ram, head);
        }
        (0..QUEUES).for_each(|queue| rig.driver.kick(queue));
        rig.settle();
        rig.balloon.info().unwrap();
        rig.balloon.stop_hints(true).unwrap();
        prop_assert!(hinting || free.count() == 0);
        rig.check_alive();
    }

    #[test]
    fn any_saved_state_is_restored_or_refused(flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6)) {
        let mut rig = Rig::new();
        rig.check_alive();
        rig.balloon.pause().unwrap();
        let mut state = rig.balloon.save().unwrap();
        for (at, value) in &flips {
            let at = at.index(state.bytes.len());
            state.bytes[at] = *value;
        }
        let Rig { memory, balloon, driver } = rig;
        let Driver { board, transport, .. } = driver;
        drop((balloon, transport));
        let board = Board::with_ram(board.ram, QUEUES);
        if let Ok(balloon) = Balloon::restore(&BalloonConfig::default(), &memory, board.wiring(), &state) {
            balloon.resume().unwrap();
            let driver = Driver::new(board, balloon.transport(), 16);
            let mut rig = Rig { memory, balloon, driver };
            (0..QUEUES).for_each(|queue| rig.driver.kick(queue));
            rig.settle();
            rig.check_alive();
        }
    }
}
