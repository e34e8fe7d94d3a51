//! Post-copy with a malicious or broken peer that has all the right certificates.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use migration::control::Control;
use migration::destination::DestinationError;
use migration::guest::{BLOCK_BYTES, PAGE_BYTES, StatePayload};
use migration::policy::MigrationMode;
use migration::report::Outcome;
use migration::testing::{Pair, Registers, Workload, machines};
use migration::transport::channels::{Channel, Incoming};
use migration::wire::frame::{PageRun, RunKind};
use migration::wire::handshake::Role;
use migration::wire::message::{Message, Totals};

use crate::party::{Forget, LONG, Lair, PAGES, Victim};

const PAGE: usize = PAGE_BYTES as usize;
const FEATURES: &[&str] = &["verify", "postcopy"];

/// A destination that offers post-copy, and the channels of its pre-copy.
struct Ready {
    victim: Victim,
    control: Channel,
    memory: Channel,
    disk: Channel,
}

/// The channels of a session.
struct Session {
    fault: Channel,
    memory: Channel,
    disk: Channel,
}

impl Ready {
    fn new() -> Self {
        let victim = Victim::new(&[4 * BLOCK_BYTES], |machine, pair| {
            machine.offers_postcopy.store(true, Ordering::SeqCst);
            pair.destination_options.recover = Duration::from_millis(400);
        });
        let (control, memory, disk) = victim.ready();
        Self { victim, control, memory, disk }
    }

    fn say(&mut self, message: &Message) {
        self.control.send(message).expect("sent");
    }

    /// Pages 0 to 63 and block 1 are announced, a session is attached.
    fn session(&mut self) -> Session {
        self.say(&Message::PostcopyPrepare);
        self.say(&Message::Missing { disk: None, first: 0, bits: vec![0xff; 8] });
        self.say(&Message::Missing { disk: Some(0), first: 0, bits: 2u64.to_le_bytes().to_vec() });
        self.say(&Message::MissingEnd { pages: 64, blocks: 1 });
        let session = self.channels();
        assert_eq!(self.control.receive("attached").expect("an answer"), Message::PostcopyReady);
        session
    }

    fn channels(&self) -> Session {
        let open = |role| self.victim.open(role).expect("welcome");
        Session { fault: open(Role::Fault), memory: open(Role::Memory(0)), disk: open(Role::Disk) }
    }

    /// The last marker everywhere, and the state.
    fn state(&mut self) {
        for channel in [&mut self.memory, &mut self.disk] {
            channel.send(&Message::RoundEnd { round: 0, last: true, totals: Totals::default() }).expect("sent");
        }
        self.say(&Message::MissingEnd { pages: 0, blocks: 0 });
        let slot = self.victim.layout.devices[0].clone();
        // Its guest walks through the announced pages.
        let workload = Workload { sweep_pages: 64, pages_per_ms: 1, ..Workload::default() };
        let registers = Registers { workload, ..Registers::default() };
        let bytes = postcard::to_stdvec(&registers).expect("registers");
        self.say(&Message::State { payloads: vec![StatePayload { slot, bytes }] });
    }

    fn commit(&mut self) {
        assert!(matches!(self.control.receive("prepared"), Ok(Message::Prepared { .. })));
        self.say(&Message::Commit);
        assert!(matches!(self.control.receive("resumed"), Ok(Message::Resumed { .. })));
    }

    /// The machine was stopped after Commit, with this in the reason.
    fn lost(self, expected: &str) {
        let (machine, world) = (Arc::clone(&self.victim.machine), Arc::clone(&self.victim.world));
        let error = self.victim.ended().expect_err("not all arrived");
        assert!(matches!(&error, DestinationError::Lost { .. }), "{error}");
        assert!(error.to_string().contains(expected), "`{expected}` is not in: {error}");
        assert!(machine.lost().is_some() && !machine.is_running());
        assert_eq!(world.violations(), Vec::<String>::new());
    }
}

#[test]
fn lists_that_lie_and_lists_at_the_wrong_moment() {
    let outside = Message::Missing { disk: None, first: 256, bits: vec![1, 0, 0, 0, 0, 0, 0, 0] };
    let no_disk = Message::Missing { disk: Some(3), first: 0, bits: vec![0; 8] };
    let cases: [(Vec<Message>, &str); 7] = [
        (vec![Message::MissingEnd { pages: 0, blocks: 0 }], "unexpected MissingEnd"),
        (vec![Message::PostcopyPrepare, outside], "lie outside the machine"),
        (vec![Message::PostcopyPrepare, no_disk], "blocks of disk 3"),
        (vec![Message::PostcopyPrepare, Message::MissingEnd { pages: 5, blocks: 0 }], "it ends with 5 pages"),
        (vec![Message::PostcopyPrepare, Message::PostcopyPrepare], "unexpected PostcopyPrepare"),
        (vec![Message::PostcopyPrepare, Message::Demand { disk: None, number: 0 }], "unexpected Demand"),
        (
            vec![Message::PostcopyPrepare, Message::Missing { disk: None, first: 1, bits: vec![0; 9] }],
            "malformed list of what is missing",
        ),
    ];
    for (messages, expected) in cases {
        let mut ready = Ready::new();
        messages.iter().for_each(|message| ready.say(message));
        ready.victim.gave_up(expected);
    }
}

#[test]
fn a_state_before_the_session_is_there() {
    let mut ready = Ready::new();
    ready.say(&Message::PostcopyPrepare);
    for channel in [&mut ready.memory, &mut ready.disk] {
        channel.send(&Message::RoundEnd { round: 0, last: true, totals: Totals::default() }).expect("sent");
    }
    let slot = ready.victim.layout.devices[0].clone();
    ready.say(&Message::State { payloads: vec![StatePayload { slot, bytes: vec![0; 16] }] });
    ready.victim.gave_up("the channels of post-copy");
}

#[test]
fn what_was_not_announced_is_not_stored() {
    type Push = fn(&mut Session);
    let cases: [(Push, &str); 6] = [
        (
            |session| {
                let run = PageRun { first: 60, count: 8, kind: RunKind::Data };
                session.memory.send_pages(&[run], &[7; 8 * PAGE]).expect("sent");
            },
            "unannounced pages",
        ),
        (
            |session| {
                session.fault.send_pages(&[PageRun { first: 200, count: 1, kind: RunKind::Zero }], &[]).expect("sent");
            },
            "unannounced pages",
        ),
        (
            |session| {
                let run = PageRun { first: 64, count: 1, kind: RunKind::Delta };
                session.memory.send_pages(&[run], &[7; PAGE]).expect("sent");
            },
            "differences of pages",
        ),
        (
            |session| {
                session.disk.send_block(0, 2, &[7; BLOCK_BYTES as usize]).expect("sent");
                session.disk.flush().expect("sent");
            },
            "unannounced blocks of disk 0",
        ),
        (
            |session| {
                session.disk.send_block(0, 1, &[7; 512]).expect("sent");
                session.disk.flush().expect("sent");
            },
            "512 bytes for block 1",
        ),
        (
            |session| {
                let totals = Totals { data: 1, zero: 0 };
                session.memory.send(&Message::RoundEnd { round: 0, last: true, totals }).expect("sent");
            },
            "the source says that it sent 1",
        ),
    ];
    for (push, expected) in cases {
        let mut ready = Ready::new();
        let mut session = ready.session();
        ready.state();
        ready.commit();
        push(&mut session);
        ready.lost(expected);
    }
}

/// Before Commit a session that breaks ends the migration, also if somebody waits for a page already.
#[test]
fn a_session_lost_before_commit_is_no_machine() {
    let mut ready = Ready::new();
    let session = ready.session();
    ready.state();
    assert!(matches!(ready.control.receive("prepared"), Ok(Message::Prepared { .. })));
    drop(session);
    // Time for the destination to see it; if Commit should overtake that, the machine is lost instead of discarded.
    std::thread::sleep(Duration::from_millis(300));
    let _ = ready.control.send(&Message::Commit);
    let world = Arc::clone(&ready.victim.world);
    let error = ready.victim.ended().expect_err("nothing arrived").to_string();
    assert!(error.contains("closed the connection") || error.contains("link lost"), "{error}");
    assert_eq!(world.running(), Vec::<&str>::new());
}

/// Swallows whatever comes.
fn swallow(mut channel: Channel) {
    std::thread::spawn(move || {
        loop {
            match channel.next("anything") {
                Ok(Incoming::Pages { length }) => {
                    if channel.read_pages(length, PAGES, &mut Forget).is_err() {
                        return;
                    }
                }
                Ok(Incoming::Message(Message::RoundEnd { round, .. })) => {
                    let _ = channel.send(&Message::RoundAck { round });
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    });
}

/// A destination that asks for what it was not owed: it gets nothing, and the source keeps what it has.
#[test]
fn demands_for_what_is_not_owed_are_refused() {
    let demands = [
        Message::Demand { disk: None, number: PAGES + 5 },
        Message::Demand { disk: None, number: u64::MAX },
        Message::Demand { disk: Some(0), number: 0 },
        Message::Goodbye,
    ];
    for demand in demands {
        let (world, source, _) = machines(PAGES, &[]);
        source.boot(Workload { filled_pages: 100, sweep_pages: 50, pages_per_ms: 5, ..Workload::default() });
        let mut pair = Pair::new();
        pair.source_options.limits.mode = MigrationMode::Postcopy;
        let lair = Lair::new(&mut pair);
        let control: Control = pair.source_control.clone();
        let sending = {
            let source = Arc::clone(&source);
            std::thread::spawn(move || pair.send(&source))
        };
        let mut channel = lair.welcome(Role::Control, FEATURES);
        assert!(matches!(channel.receive("layout"), Ok(Message::Layout { .. })));
        swallow(lair.welcome(Role::Memory(0), FEATURES));
        channel.send(&Message::Ready).expect("sent");
        let mut fault = loop {
            match channel.receive("pings and lists").expect("an answer") {
                Message::Ping { nonce } => channel.send(&Message::Pong { nonce }).expect("sent"),
                Message::MissingEnd { .. } => break lair.welcome(Role::Fault, FEATURES),
                _ => {}
            }
        };
        swallow(lair.welcome(Role::Memory(0), FEATURES));
        channel.send(&Message::PostcopyReady).expect("sent");
        while !matches!(channel.receive("state").expect("an answer"), Message::State { .. }) {}
        channel.send(&Message::Prepared { restore_us: 1 }).expect("sent");
        assert_eq!(channel.receive("commit").expect("an answer"), Message::Commit);
        channel.send(&Message::Resumed { resume_us: 1 }).expect("sent");
        fault.send(&demand).expect("sent");
        let start = Instant::now();
        while control.status().note.is_none() {
            assert!(start.elapsed() < LONG, "{demand:?} was not noticed");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!matches!(fault.next("nothing"), Ok(Incoming::Pages { .. })), "{demand:?} was answered");
        control.abandon();
        let report = sending.join().expect("no panic");
        assert_eq!(report.outcome, Outcome::InDoubt, "{}", report.reason);
        assert!(source.is_fenced() && !source.is_running());
        assert_eq!(world.violations(), Vec::<String>::new());
    }
}
