//! Frames, pages, blocks, messages and state that lie, from a source that was let in.

use std::time::Duration;

use migration::guest::{BLOCK_BYTES, StatePayload};
use migration::page::pack::pack;
use migration::testing::FakeMachine;
use migration::transport::channels::Channel;
use migration::wire::frame::{Header, Kind, PageRun, RunKind};
use migration::wire::message::{Message, Totals};

use crate::party::Victim;

/// The last block of its disk is a short one.
fn waiting() -> Victim {
    Victim::new(&[4 * BLOCK_BYTES + 100], |_, pair| pair.destination_options.deadline = Duration::from_secs(1))
}

#[test]
fn oversized_frames_cost_no_memory() {
    let victim = waiting();
    let (_control, memory, _disk) = victim.ready();
    let mut stream = memory.into_stream();
    // Sequence 1, since the hello was 0; the header alone, with a length over the cap of its kind.
    let header = Header { kind: Kind::Pages, length: u32::MAX, sequence: 1 };
    stream.queue(&header.encode()).expect("queued");
    stream.flush().expect("sent");
    victim.gave_up("page frame of 4294967295 bytes");
}

#[test]
fn frames_out_of_sequence() {
    let victim = waiting();
    let (_control, memory, _disk) = victim.ready();
    let mut stream = memory.into_stream();
    stream.queue(&Header { kind: Kind::Pages, length: 24, sequence: 5 }.encode()).expect("queued");
    stream.flush().expect("sent");
    victim.gave_up("frame 5 arrived where frame 1 was due");
}

#[test]
fn lying_page_numbers() {
    for (run, data) in [
        (PageRun { first: 255, count: 2, kind: RunKind::Data }, 2),
        (PageRun { first: u64::MAX, count: 1, kind: RunKind::Data }, 1),
        (PageRun { first: 0, count: u32::MAX, kind: RunKind::Zero }, 0),
        (PageRun { first: 256, count: 1, kind: RunKind::Zero }, 0),
    ] {
        let victim = waiting();
        let (_control, mut memory, _disk) = victim.ready();
        memory.send_pages(&[run], &vec![1; data * 4096]).expect("sent");
        victim.gave_up("lie outside the machine, which has 256");
    }
}

#[test]
fn tables_that_do_not_fit_their_frame() {
    for table in [
        // More runs than the frame can hold, none at all, a run of an unknown kind, data that is missing.
        [&[200u8, 0, 0, 0, 0, 0, 0, 0][..], &[0; 16]].concat(),
        vec![0; 24],
        [&[1u8, 0, 0, 0, 0, 0, 0, 0][..], &[0; 8], &[1, 0, 0, 0, 9, 0, 0, 0]].concat(),
        [&[1u8, 0, 0, 0, 0, 0, 0, 0][..], &[0; 8], &[1, 0, 0, 0, 0, 0, 0, 0]].concat(),
    ] {
        let victim = waiting();
        let (_control, memory, _disk) = victim.ready();
        let mut stream = memory.into_stream();
        let header = Header { kind: Kind::Pages, length: table.len() as u32, sequence: 1 };
        stream.queue(&[&header.encode()[..], &table].concat()).expect("queued");
        stream.flush().expect("sent");
        victim.gave_up("malformed page frame");
    }
}

#[test]
fn packed_frames_that_hold_something_else() {
    let packed = |kind: u8, length: u32, plain: &[u8]| {
        let mut data = Vec::new();
        let length_packed = pack(plain, &mut data).expect("zeroes pack");
        data.truncate(length_packed);
        [&[kind, 0, 0, 0][..], &length.to_le_bytes(), &data].concat()
    };
    let plain = [0; 5000];
    for (payload, expected) in [
        (vec![2, 0, 0], "shorter than its head"),
        (packed(2, 0, &plain), "is no LZ4 block of 0 bytes"),
        (packed(2, 4999, &plain), "is no LZ4 block of 4999 bytes"),
        (packed(2, 5001, &plain), "unpacks to 5000 bytes instead of 5001"),
        (packed(2, u32::MAX, &plain), "at most"),
        (packed(1, 5000, &plain), "of kind 1"),
        (packed(5, 5000, &plain), "of kind 5"),
        (vec![2, 0, 0, 0, 0, 1, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff], "is no LZ4 block"),
        // Unpacked it is what `tables_that_do_not_fit_their_frame` and `messages_at_the_wrong_moment` send as it is.
        (packed(2, 5000, &plain), "a table of 0 runs"),
        (packed(3, 5000, &plain), "unexpected block frame"),
    ] {
        let victim = waiting();
        let (_control, memory, _disk) = victim.ready();
        let mut stream = memory.into_stream();
        let header = Header { kind: Kind::Packed, length: payload.len() as u32, sequence: 1 };
        stream.queue(&[&header.encode()[..], &payload].concat()).expect("queued");
        stream.flush().expect("sent");
        victim.gave_up(expected);
    }
}

#[test]
fn lying_blocks() {
    type Lie = fn(&mut Channel);
    let lies: [(Lie, &str); 6] = [
        (|disk| drop(disk.send_block(0, 5, &[1; BLOCK_BYTES as usize])), "blocks of disk 0 5+1 lie outside"),
        (|disk| drop(disk.send_block(9, 0, &[1; BLOCK_BYTES as usize])), "disks 9+1 lie outside"),
        (|disk| drop(disk.send_block(0, 0, &[1; 100])), "100 bytes for block 0"),
        // The last block is a short one.
        (|disk| drop(disk.send_block(0, 4, &[1; 101])), "101 bytes for block 4"),
        (|disk| drop(disk.queue(&Message::ZeroBlocks { disk: 0, first: 3, count: 3 })), "3+3 lie outside"),
        (|disk| drop(disk.queue(&Message::ZeroBlocks { disk: 0, first: u64::MAX, count: 2 })), "lie outside"),
    ];
    for (lie, expected) in lies {
        let victim = waiting();
        let (_control, _memory, mut disk) = victim.ready();
        lie(&mut disk);
        disk.flush().expect("sent");
        victim.gave_up(expected);
    }
}

#[test]
fn lying_questions_about_an_old_image() {
    for (disk, first, count, reuse, expected) in [
        (0, 0, 0, true, "0+0 lie outside"),
        (0, 0, 6, true, "0+6 lie outside"),
        (0, u64::MAX, 2, true, "lie outside"),
        (1, 0, 1, true, "disks 1+1 lie outside"),
        // Nothing was said of an old image.
        (0, 0, 1, false, "unexpected AskReusable"),
    ] {
        let victim = Victim::new(&[4 * BLOCK_BYTES + 100], |_, pair| pair.destination_options.reuse = reuse);
        let (_control, _memory, mut channel) = victim.ready();
        channel.send(&Message::AskReusable { disk, first, count }).expect("sent");
        victim.gave_up(expected);
    }
    let victim = Victim::new(&[4096 * BLOCK_BYTES], |_, pair| pair.destination_options.reuse = true);
    let (_control, _memory, mut channel) = victim.ready();
    channel.send(&Message::AskReusable { disk: 0, first: 0, count: 1025 }).expect("sent");
    victim.gave_up("has 1024");
}

#[test]
fn totals_that_do_not_match() {
    let victim = waiting();
    let (_control, mut memory, _disk) = victim.ready();
    let totals = Totals { data: 3, zero: 0 };
    memory.send(&Message::RoundEnd { round: 0, last: true, totals }).expect("sent");
    victim.gave_up("says that it sent 3 pages");
}

#[test]
fn messages_at_the_wrong_moment() {
    for (message, expected) in [
        (Message::Commit, "unexpected Commit"),
        (Message::Ready, "unexpected Ready"),
        (Message::Goodbye, "unexpected Goodbye"),
    ] {
        let victim = waiting();
        let (mut control, _memory, _disk) = victim.ready();
        control.send(&message).expect("sent");
        victim.gave_up(expected);
    }
    // Pages on the control channel, blocks on a memory channel.
    let victim = waiting();
    let (mut control, _memory, _disk) = victim.ready();
    control.send_pages(&[PageRun { first: 0, count: 1, kind: RunKind::Zero }], &[]).expect("sent");
    victim.gave_up("unexpected page frame");
    let victim = waiting();
    let (_control, mut memory, _disk) = victim.ready();
    memory.send_block(0, 0, &[1; BLOCK_BYTES as usize]).expect("sent");
    memory.flush().expect("sent");
    victim.gave_up("unexpected block frame");
}

/// Everything is sent properly up to the state, which is not the one that was announced.
#[test]
fn payloads_that_were_not_announced() {
    let slot = FakeMachine::layout(256, &[]).devices[0].clone();
    let other = migration::guest::DeviceSlot { version: 9, ..slot.clone() };
    let payload = |slot: &migration::guest::DeviceSlot| StatePayload { slot: slot.clone(), bytes: vec![0; 8] };
    for (payloads, expected) in [
        (vec![], "0 payloads for `vcpu/0`"),
        (vec![payload(&slot), payload(&slot)], "2 payloads for `vcpu/0`"),
        (vec![payload(&other)], "version 9 was not announced"),
    ] {
        let victim = waiting();
        let (mut control, mut memory, mut disk) = victim.ready();
        for channel in [&mut memory, &mut disk] {
            channel.send(&Message::RoundEnd { round: 0, last: true, totals: Totals::default() }).expect("sent");
            assert_eq!(channel.receive("the mark").expect("an answer"), Message::RoundAck { round: 0 });
        }
        control.send(&Message::State { payloads }).expect("sent");
        assert!(control.receive("prepared").is_err());
        victim.gave_up(expected);
    }
}

/// The source vanishes after Prepared: the machine is not started, whatever happens then.
#[test]
fn no_commit_no_machine() {
    let victim = waiting();
    let (mut control, mut memory, mut disk) = victim.ready();
    for channel in [&mut memory, &mut disk] {
        channel.send(&Message::RoundEnd { round: 0, last: true, totals: Totals::default() }).expect("sent");
    }
    let slot = victim.layout.devices[0].clone();
    control.send(&Message::State { payloads: vec![StatePayload { slot, bytes: vec![0; 16] }] }).expect("sent");
    assert!(matches!(control.receive("prepared"), Ok(Message::Prepared { .. })));
    drop(control);
    victim.gave_up("waiting for Commit");
}
