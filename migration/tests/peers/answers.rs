//! A destination that lies, is slow, or says nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::guest::BLOCK_BYTES;
use migration::report::{Outcome, Report};
use migration::testing::{FakeMachine, Owner, Pair, Workload, World, machines, settle};
use migration::transport::channels::{Channel, Incoming};
use migration::wire::frame::{Header, Kind};
use migration::wire::handshake::{Role, Welcome};
use migration::wire::message::Message;

use crate::party::{Forget, Lair, PAGES, welcome};

/// Pre-copy only, and something that a later release may have: it is ignored.
const FEATURES: &[&str] = &["verify", "time-travel"];

/// A destination of our own making, and a real source.
fn lying_destination(act: impl FnOnce(&mut Channel, &Lair) + Send + 'static) -> (Report, Arc<World>, Arc<FakeMachine>) {
    let (world, source, _) = machines(PAGES, &[]);
    source.boot(Workload { filled_pages: 100, sweep_pages: 10, pages_per_ms: 1, ..Workload::default() });
    let mut pair = Pair::new();
    let lair = Lair::new(&mut pair);
    let liar = std::thread::spawn(move || act(&mut lair.accept(Role::Control), &lair));
    let start = Instant::now();
    let report = pair.send(&source);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    liar.join().expect("no panic");
    (report, world, source)
}

#[test]
fn answers_that_make_no_sense() {
    type Answer = fn(&mut Channel);
    let cases: [(Answer, &str); 4] = [
        (|control| drop(control.send(&Message::Ready)), "unexpected Ready while waiting for Welcome"),
        (
            |control| {
                let from_the_future = Welcome { version: 9, features: Vec::new(), extension: Vec::new() };
                drop(control.send(&Message::Welcome(from_the_future)));
            },
            "unexpected Welcome",
        ),
        (
            |control| drop(control.send(&Message::Abort { reason: "no room\nfor you \u{1b}[1m".to_owned() })),
            "the destination gave up: no room for you  [1m",
        ),
        (|control| control.close(), "closed the connection"),
    ];
    for (answer, expected) in cases {
        let (report, world, _) = lying_destination(move |control, _| answer(control));
        assert_eq!((report.outcome, world.running()), (Outcome::Failed, vec!["a"]), "{}", report.reason);
        assert!(report.reason.contains(expected), "`{expected}` is not in: {}", report.reason);
    }
}

/// Plays a destination up to the moment when Commit has arrived.
fn up_to_commit(control: &mut Channel, lair: &Lair) {
    control.send(&welcome(FEATURES)).expect("sent");
    assert!(matches!(control.receive("layout"), Ok(Message::Layout { .. })));
    let mut memory = lair.welcome(Role::Memory(0), FEATURES);
    control.send(&Message::Ready).expect("sent");
    let data = std::thread::spawn(move || {
        let mut sink = Forget;
        loop {
            match memory.next("pages") {
                Ok(Incoming::Pages { length }) => {
                    memory.read_pages(length, PAGES, &mut sink).expect("pages");
                }
                Ok(Incoming::Message(Message::RoundEnd { round, last, .. })) => {
                    memory.send(&Message::RoundAck { round }).expect("sent");
                    if last {
                        return memory;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    });
    loop {
        match control.receive("messages").expect("a message") {
            Message::Ping { nonce } => control.send(&Message::Pong { nonce }).expect("sent"),
            Message::State { .. } => break,
            other => panic!("{}", other.name()),
        }
    }
    let _memory = data.join().expect("no panic");
    control.send(&Message::Prepared { restore_us: 1 }).expect("sent");
    assert_eq!(control.receive("commit").expect("a message"), Message::Commit);
}

#[test]
fn after_commit_only_the_destinations_word_brings_it_back() {
    // It says nothing, or something else than was asked: in doubt, fenced.
    let silent: [fn(&mut Channel); 2] = [|control| control.close(), |control| drop(control.send(&Message::Ready))];
    for answer in silent {
        let (report, world, source) = lying_destination(move |control, lair| {
            up_to_commit(control, lair);
            answer(control);
        });
        assert_eq!(report.outcome, Outcome::InDoubt, "{}", report.reason);
        assert!(report.reason.contains("Commit was sent and not answered"), "{}", report.reason);
        assert!(source.is_fenced() && world.running().is_empty());
        assert_eq!(world.violations(), Vec::<String>::new());
    }
    // It says that it did not run it: the machine runs here again.
    let (report, world, source) = lying_destination(|control, lair| {
        up_to_commit(control, lair);
        control.abort("the machine did not start");
    });
    assert_eq!(report.outcome, Outcome::Failed, "{}", report.reason);
    assert!(report.reason.contains("the machine did not start"), "{}", report.reason);
    assert!(!source.is_fenced());
    assert_eq!(world.running(), ["a"]);
    source.check().expect("nothing was lost");
}

/// A destination that reads slowly, but reads, is waited for.
#[test]
fn a_slow_reader_is_waited_for() {
    let (world, source, destination) = machines(4096, &[]);
    source.boot(Workload { filled_pages: 3000, ..Workload::default() });
    destination.faults.on("write_pages", |call| {
        if call % 100 == 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    });
    let (report, received) = Pair::new().run(&source, &destination);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination));
}

/// A destination that answers one byte at a time does not hold a stopped guest for long.
#[test]
fn a_dribbling_destination_does_not_keep_the_guest_stopped() {
    let (report, world, source) = lying_destination(|control, lair| {
        control.send(&welcome(FEATURES)).expect("sent");
        assert!(matches!(control.receive("layout"), Ok(Message::Layout { .. })));
        let mut memory = lair.welcome(Role::Memory(0), FEATURES);
        control.send(&Message::Ready).expect("sent");
        let data = std::thread::spawn(move || {
            while let Ok(frame) = memory.next("pages") {
                match frame {
                    Incoming::Pages { length } => {
                        memory.read_pages(length, PAGES, &mut Forget).expect("pages");
                    }
                    Incoming::Message(Message::RoundEnd { round, .. }) => {
                        memory.send(&Message::RoundAck { round }).expect("sent");
                    }
                    other => panic!("{other:?}"),
                }
            }
        });
        while let Message::Ping { nonce } = control.receive("messages").expect("a message") {
            control.send(&Message::Pong { nonce }).expect("sent");
        }
        // A header that announces a long message, then byte after byte of it.
        let sent = control.frames_sent();
        let header = Header { kind: Kind::Message, length: 1 << 20, sequence: sent }.encode();
        let stream = control.stream_mut();
        stream.queue(&header).and_then(|_| stream.flush()).expect("sent");
        while stream.queue(&[0]).and_then(|_| stream.flush()).is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
        data.join().expect("no panic");
    });
    assert_eq!((report.outcome, world.running()), (Outcome::Failed, vec!["a"]), "{}", report.reason);
    assert!(report.reason.contains("not done in time"), "{}", report.reason);
    source.check().expect("nothing was lost");
}

/// A destination that says something else than what it was asked about its old image.
#[test]
fn answers_about_an_old_image_that_make_no_sense() {
    for (answer, expected) in [
        (Message::Reusable { digests: vec![None; 3] }, "3 digests for 4 blocks"),
        (Message::Reusable { digests: Vec::new() }, "0 digests for 4 blocks"),
        (Message::RoundAck { round: 0 }, "unexpected RoundAck"),
    ] {
        let (world, source, _) = machines(PAGES, &[4 * BLOCK_BYTES]);
        for block in 0..4 {
            source.disks[0].poke(block, vec![1; BLOCK_BYTES as usize]);
        }
        source.boot(Workload { filled_pages: 10, ..Workload::default() });
        let mut pair = Pair::new();
        let lair = Lair::new(&mut pair);
        let liar = std::thread::spawn(move || {
            let mut control = lair.welcome(Role::Control, &["reuse"]);
            assert!(matches!(control.receive("layout"), Ok(Message::Layout { .. })));
            let mut channels = [lair.accept_any(), lair.accept_any()];
            for channel in &mut channels {
                channel.send(&welcome(&["reuse"])).expect("sent");
            }
            control.send(&Message::Ready).expect("sent");
            channels.sort_by_key(|channel| channel.role() == Role::Disk);
            let [_memory, disk] = &mut channels;
            let pinger = std::thread::spawn(move || {
                while let Ok(Message::Ping { nonce }) = control.receive("pings") {
                    drop(control.send(&Message::Pong { nonce }));
                }
            });
            let question = disk.receive("a question").expect("a question");
            assert_eq!(question, Message::AskReusable { disk: 0, first: 0, count: 4 });
            disk.send(&answer).expect("sent");
            pinger.join().expect("no panic");
        });
        let report = pair.send(&source);
        liar.join().expect("no panic");
        assert_eq!((report.outcome, world.running()), (Outcome::Failed, vec!["a"]), "{}", report.reason);
        assert!(report.reason.contains(expected), "`{expected}` is not in: {}", report.reason);
    }
}
