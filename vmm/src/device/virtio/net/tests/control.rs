//! The guest is asked to announce itself, and answers.

use super::super::state::{NetStateV1, NetStateV2};
use super::*;
use crate::device::{BusDevice, state};

const CTRL: usize = 2;
const ANNOUNCE: u64 = BASIC | feature::CTRL_VQ | feature::GUEST_ANNOUNCE;
const COMMAND: u64 = TX_BUFFER + 0x1000;
const ANSWER: u64 = COMMAND + 16;

impl Rig {
    fn status(&mut self) -> u8 {
        let mut status = [0];
        self.driver.transport.read(0x106, &mut status);
        status[0]
    }

    /// Sends a command with room for the answer; returns that.
    fn command(&mut self, command: &[u8]) -> u8 {
        self.driver.put(COMMAND, command);
        self.driver.put(ANSWER, &[0xaa]);
        let parts = [(COMMAND, command.len() as u32, false), (ANSWER, 1, true)];
        let head = self.driver.queues[CTRL].add(&self.driver.board.ram, &parts);
        self.driver.kick(CTRL);
        assert_eq!(self.driver.wait_used(CTRL), (head, 1));
        self.driver.get(ANSWER, 1)[0]
    }

    /// Waits for the request by interrupts alone. The question is there a moment before it is announced.
    fn wait_asked(&mut self) {
        while self.status() != 3 || self.driver.read(0x60) & 2 == 0 {
            assert!(self.driver.wait_interrupt(Duration::from_secs(10)), "nothing is asked");
        }
    }

    fn announced(&self) -> u64 {
        self.net.counters().announced.load(Ordering::Relaxed)
    }
}

#[test]
fn a_driver_that_can_is_asked_and_says_when_it_has_done_it() {
    in_namespace(|| {
        let mut rig = Rig::new(ANNOUNCE);
        let (status, generation) = (rig.status(), rig.driver.read(0xfc));
        assert_eq!(status, 1, "the link is up, and nothing is asked");
        rig.net.announce();
        rig.wait_asked();
        assert_eq!(rig.driver.read(0x60) & 2, 2, "the configuration has changed");
        assert_ne!(rig.driver.read(0xfc), generation);
        // Nothing else is known, and nothing else answers the question.
        for unknown in [&[3, 1][..], &[1, 0, 7], &[3]] {
            assert_eq!((rig.command(unknown), rig.status()), (1, 3), "{unknown:?}");
        }
        assert_eq!((rig.command(&[3, 0]), rig.status(), rig.announced()), (0, 1, 1));
        // Again, across a pause.
        rig.net.pause().unwrap();
        rig.net.save().unwrap();
        rig.net.resume().unwrap();
        rig.net.announce();
        rig.wait_asked();
        assert_eq!((rig.command(&[3, 0]), rig.status(), rig.announced()), (0, 1, 2));
    });
}

#[test]
fn a_driver_that_cannot_is_left_alone() {
    in_namespace(|| {
        let mut rig = Rig::new(BASIC);
        rig.net.announce();
        // The frames of the card itself are sent three times; it has been at the question by then.
        for _ in 0..3 {
            rig.wire.receive(Duration::from_secs(5)).unwrap();
        }
        assert_eq!((rig.status(), rig.driver.read(0x60)), (1, 0));
    });
}

#[test]
fn a_command_without_room_for_an_answer_is_the_end_of_it() {
    in_namespace(|| {
        let mut rig = Rig::new(ANNOUNCE);
        rig.driver.queues[CTRL].add(&rig.driver.board.ram, &[(COMMAND, 2, false)]);
        rig.driver.kick(CTRL);
        rig.driver.wait_needs_reset();
        rig.driver.start(ANNOUNCE);
        assert_eq!(rig.command(&[3, 0]), 0);
    });
}

/// A card that was saved by the version before, which had two queues.
#[test]
fn a_card_without_a_control_queue_is_restored() {
    in_namespace(|| {
        let mut rig = Rig::new(BASIC);
        rig.offer(10);
        rig.net.pause().unwrap();
        let newest = rig.net.save().unwrap();
        let NetStateV2 { mut transport, mac, link_up, .. } = state::decode(&newest.slot, &newest).unwrap();
        assert_eq!(transport.queues.pop().map(|queue| queue.ready), Some(true));
        let saved = NetStateV1 { transport, mac, addresses: vec![[10, 0, 0, 2]], link_up };
        let slot = migration::guest::DeviceSlot { version: 1, ..newest.slot };
        let earlier: StatePayload = state::encode(slot, &saved).unwrap();
        let mut rig = Rig::with_card(rig.without_card(), &earlier);
        rig.net.resume().unwrap();
        // What is sent before the kernel has seen the tap's carrier is lost.
        let end = Instant::now() + Duration::from_secs(10);
        rig.net.announce();
        let reverse = rig.wire.receive(Duration::from_secs(5)).unwrap();
        let gratuitous = rig.wire.receive(Duration::from_secs(5)).unwrap();
        assert_eq!((&reverse[12..14], &gratuitous[28..32]), (&[0x80, 0x35][..], &[10, 0, 0, 2][..]));
        let mut used = None;
        while used.is_none() {
            assert!(Instant::now() < end, "no frame arrives");
            rig.wire.send(&frame(90, 9));
            used = rig.driver.try_wait_used(RX, Duration::from_millis(100));
        }
        assert_eq!((used, rig.driver.get(DATA + 12, 90)), (Some((0, 102)), frame(90, 9)));
    });
}
