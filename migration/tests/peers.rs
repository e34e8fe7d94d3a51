//! A malicious or broken peer that has all the right certificates.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use migration::destination::{DestinationError, Received};
use migration::guest::{BLOCK_BYTES, MachineLayout, StatePayload};
use migration::report::{Outcome, Report};
use migration::testing::{FakeMachine, Owner, Pair, Workload, World, machines, settle};
use migration::transport::TransportError;
use migration::transport::channels::Channel;
use migration::transport::stream::{Stop, TlsStream};
use migration::transport::tls::{Acceptor, Connector};
use migration::wire::frame::{Header, Kind, PageRun};
use migration::wire::handshake::{Hello, MAGIC, Role, Welcome, proof};
use migration::wire::message::{Message, Totals};

const LONG: Duration = Duration::from_secs(5);

/// A destination that waits, and a source of our own making.
struct Victim {
    pair: Pair,
    world: Arc<World>,
    machine: Arc<FakeMachine>,
    layout: MachineLayout,
    receiving: JoinHandle<Result<Received, DestinationError>>,
    address: std::net::SocketAddr,
}

impl Victim {
    fn new() -> Self {
        let (world, _, machine) = machines(256, &[4 * BLOCK_BYTES + 100]);
        let mut pair = Pair::new();
        pair.destination_options.deadline = Duration::from_secs(1);
        let address = pair.address();
        let receiving = pair.receive(&machine);
        Self { pair, world, machine, layout: FakeMachine::layout(256, &[4 * BLOCK_BYTES + 100]), receiving, address }
    }

    fn stream(&self) -> TlsStream {
        let options = &self.pair.source_options;
        let connector = Connector::new(&options.identity, &options.destination_host).expect("a good identity");
        let tcp = TcpStream::connect(self.address).expect("it listens");
        tcp.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
        TlsStream::handshake(connector.session().expect("a session"), tcp, Stop::default(), LONG).expect("TLS")
    }

    fn open(&self, role: Role) -> Result<Channel, TransportError> {
        let options = &self.pair.source_options;
        Channel::introduce(self.stream(), &options.token, &options.id, role).map(|(channel, _)| channel)
    }

    /// Control, one memory channel and the disk channel, all of them welcomed, and the machine built.
    fn ready(&self) -> (Channel, Channel, Channel) {
        let mut control = self.open(Role::Control).expect("welcome");
        control.send(&Message::Layout { layout: self.layout.clone(), streams: 1 }).expect("sent");
        let memory = self.open(Role::Memory(0)).expect("welcome");
        let disk = self.open(Role::Disk).expect("welcome");
        assert_eq!(control.receive("ready").expect("an answer"), Message::Ready);
        (control, memory, disk)
    }

    /// The destination has given up with this in its reason; nothing ever ran.
    fn gave_up(self, expected: &str) {
        let error = self.receiving.join().expect("it does not panic").expect_err("nothing arrived").to_string();
        assert!(error.contains(expected), "`{expected}` is not in: {error}");
        assert!(self.machine.is_discarded());
        assert_eq!((self.world.running(), self.world.violations()), (vec![], vec![]));
    }
}

fn hello(victim: &Victim, stream: &TlsStream, role: Role) -> Hello {
    let options = &victim.pair.source_options;
    let session = stream.session_key().expect("a session");
    Hello {
        magic: MAGIC,
        versions: (1, 1),
        features: Vec::new(),
        id: options.id.clone(),
        role,
        proof: *proof(&options.token, &session, &options.id, role).as_bytes(),
        extension: Vec::new(),
    }
}

/// Sends a hello; returns the refusal.
fn refused(victim: &Victim, change: impl FnOnce(&mut Hello)) -> String {
    let stream = victim.stream();
    let mut hello = hello(victim, &stream, Role::Control);
    change(&mut hello);
    let mut channel = Channel::new(stream, Role::Control);
    channel.send(&Message::Hello(hello)).expect("sent");
    channel.receive("an answer").expect_err("a refusal").to_string()
}

#[test]
fn hellos_that_are_refused_and_the_wait_goes_on() {
    let victim = Victim::new();
    let wrong_token = refused(&victim, |hello| hello.proof[31] ^= 1);
    assert!(wrong_token.contains("one-time token"), "{wrong_token}");
    // A proof that was good in another session, as somebody would replay it.
    let replayed = hello(&victim, &victim.stream(), Role::Control).proof;
    let replay = refused(&victim, |hello| hello.proof = replayed);
    assert!(replay.contains("another session"), "{replay}");
    let other_id = refused(&victim, |hello| hello.id = "x\n\u{1b}[31m".repeat(20));
    assert!(other_id.contains("another migration") && !other_id.contains('\u{1b}'), "{other_id}");
    let version = refused(&victim, |hello| hello.versions = (7, 9));
    assert!(version.contains("versions 7 to 9") && version.contains("1 to 1"), "{version}");
    let magic = refused(&victim, |hello| hello.magic = *b"SOMEBODY");
    assert!(magic.contains("does not begin as a migration does"), "{magic}");
    // A proof for one role is not good for another.
    let role = refused(&victim, |hello| hello.role = Role::Disk);
    assert!(role.contains("one-time token"), "{role}");
    // Eight kilobytes are enough for a hello.
    let long = refused(&victim, |hello| hello.extension = vec![0; 9000]);
    assert!(long.contains("at most 8192"), "{long}");
    // After all of these the right one is welcome.
    let (control, _, _) = victim.ready();
    drop(control);
    victim.gave_up("closed the connection");
}

#[test]
fn garbage_after_tls() {
    let victim = Victim::new();
    let mut stream = victim.stream();
    stream.queue(&[0xa5; 64]).expect("queued");
    stream.flush().expect("sent");
    let mut channel = Channel::new(stream, Role::Control);
    let answer = channel.receive("an answer").expect_err("a refusal").to_string();
    assert!(answer.contains("unknown kind 165"), "{answer}");
    victim.gave_up("no source proved itself");
}

#[test]
fn oversized_frames_cost_no_memory() {
    let victim = Victim::new();
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
    let victim = Victim::new();
    let (_control, memory, _disk) = victim.ready();
    let mut stream = memory.into_stream();
    stream.queue(&Header { kind: Kind::Pages, length: 24, sequence: 5 }.encode()).expect("queued");
    stream.flush().expect("sent");
    victim.gave_up("frame 5 arrived where frame 1 was due");
}

#[test]
fn lying_page_numbers() {
    for (run, data) in [
        (PageRun { first: 255, count: 2, zero: false }, 2),
        (PageRun { first: u64::MAX, count: 1, zero: false }, 1),
        (PageRun { first: 0, count: u32::MAX, zero: true }, 0),
        (PageRun { first: 256, count: 1, zero: true }, 0),
    ] {
        let victim = Victim::new();
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
        let victim = Victim::new();
        let (_control, memory, _disk) = victim.ready();
        let mut stream = memory.into_stream();
        let header = Header { kind: Kind::Pages, length: table.len() as u32, sequence: 1 };
        stream.queue(&[&header.encode()[..], &table].concat()).expect("queued");
        stream.flush().expect("sent");
        victim.gave_up("malformed page frame");
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
        let victim = Victim::new();
        let (_control, _memory, mut disk) = victim.ready();
        lie(&mut disk);
        disk.flush().expect("sent");
        victim.gave_up(expected);
    }
}

#[test]
fn totals_that_do_not_match() {
    let victim = Victim::new();
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
        let victim = Victim::new();
        let (mut control, _memory, _disk) = victim.ready();
        control.send(&message).expect("sent");
        victim.gave_up(expected);
    }
    // Pages on the control channel, blocks on a memory channel.
    let victim = Victim::new();
    let (mut control, _memory, _disk) = victim.ready();
    control.send_pages(&[PageRun { first: 0, count: 1, zero: true }], &[]).expect("sent");
    victim.gave_up("unexpected page frame");
    let victim = Victim::new();
    let (_control, mut memory, _disk) = victim.ready();
    memory.send_block(0, 0, &[1; BLOCK_BYTES as usize]).expect("sent");
    memory.flush().expect("sent");
    victim.gave_up("unexpected block frame");
}

#[test]
fn duplicate_and_unknown_roles_are_refused_and_the_first_stays() {
    let victim = Victim::new();
    let mut control = victim.open(Role::Control).expect("welcome");
    control.send(&Message::Layout { layout: victim.layout.clone(), streams: 1 }).expect("sent");
    let _memory = victim.open(Role::Memory(0)).expect("welcome");
    for (role, expected) in [
        (Role::Memory(0), "a memory 0 channel already"),
        (Role::Memory(1), "no memory 1 channel was announced"),
        (Role::Control, "no control channel was announced"),
    ] {
        let error = victim.open(role).err().expect("a refusal").to_string();
        assert!(error.contains(expected), "{error}");
    }
    let _disk = victim.open(Role::Disk).expect("welcome");
    assert_eq!(control.receive("ready").expect("an answer"), Message::Ready);
    drop(control);
    victim.gave_up("closed the connection");
}

#[test]
fn too_few_channels() {
    let victim = Victim::new();
    let mut control = victim.open(Role::Control).expect("welcome");
    control.send(&Message::Layout { layout: victim.layout.clone(), streams: 4 }).expect("sent");
    let _memory = victim.open(Role::Memory(2)).expect("welcome");
    let told = control.receive("ready").expect_err("a refusal").to_string();
    assert!(told.contains("only 1 of 5 data channels"), "{told}");
    victim.gave_up("only 1 of 5 data channels");
}

#[test]
fn a_layout_that_no_machine_can_have() {
    let victim = Victim::new();
    let mut control = victim.open(Role::Control).expect("welcome");
    let mut layout = victim.layout.clone();
    layout.memory[0].bytes = 1 << 62;
    control.send(&Message::Layout { layout, streams: 1 }).expect("sent");
    let told = control.receive("ready").expect_err("a refusal").to_string();
    assert!(told.contains("malformed layout"), "{told}");
    assert_eq!(victim.machine.faults.calls("prepare"), 0);
    victim.gave_up("malformed layout");
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
        let victim = Victim::new();
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
    let victim = Victim::new();
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

/// A destination of our own making, and a real source.
fn lying_destination(
    act: impl FnOnce(&mut Channel, &mut dyn FnMut(Role) -> Channel) + Send + 'static,
) -> (Report, Arc<World>, Arc<FakeMachine>) {
    let (world, source, _) = machines(256, &[]);
    source.boot(Workload { filled_pages: 100, sweep_pages: 10, pages_per_ms: 1, ..Workload::default() });
    let mut pair = Pair::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    pair.source_options.address = listener.local_addr().expect("its address");
    let acceptor = Acceptor::new(&pair.destination_options.identity, "host-a").expect("a good identity");
    let liar = std::thread::spawn(move || {
        let mut accept = move |role: Role| {
            let (tcp, _) = listener.accept().expect("the source connects");
            tcp.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
            let session = acceptor.session().expect("a session");
            let stream = TlsStream::handshake(session, tcp, Stop::default(), LONG).expect("TLS");
            let mut channel = Channel::new(stream, role);
            assert!(matches!(channel.receive("a hello"), Ok(Message::Hello(_))));
            channel
        };
        let mut control = accept(Role::Control);
        act(&mut control, &mut accept);
    });
    let start = Instant::now();
    let report = pair.send(&source);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    liar.join().expect("no panic");
    (report, world, source)
}

fn welcome() -> Message {
    Message::Welcome(Welcome { version: 1, features: vec!["verify".to_owned()], extension: Vec::new() })
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
fn up_to_commit(control: &mut Channel, accept: &mut dyn FnMut(Role) -> Channel) {
    control.send(&welcome()).expect("sent");
    assert!(matches!(control.receive("layout"), Ok(Message::Layout { .. })));
    let mut memory = accept(Role::Memory(0));
    memory.send(&welcome()).expect("sent");
    control.send(&Message::Ready).expect("sent");
    let data = std::thread::spawn(move || {
        let mut sink = Forget;
        loop {
            match memory.next("pages") {
                Ok(migration::transport::channels::Incoming::Pages { length }) => {
                    memory.read_pages(length, 256, &mut sink).expect("pages");
                }
                Ok(migration::transport::channels::Incoming::Message(Message::RoundEnd { round, last, .. })) => {
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

struct Forget;

impl migration::transport::channels::PageSink for Forget {
    type Error = TransportError;

    fn store(&mut self, _: u64, _: &[u8]) -> Result<(), TransportError> {
        Ok(())
    }

    fn zero(&mut self, _: std::ops::Range<u64>) -> Result<(), TransportError> {
        Ok(())
    }
}

#[test]
fn after_commit_only_the_destinations_word_brings_it_back() {
    // It says nothing, or something else than was asked: in doubt, fenced.
    let silent: [fn(&mut Channel); 2] = [|control| control.close(), |control| drop(control.send(&Message::Ready))];
    for answer in silent {
        let (report, world, source) = lying_destination(move |control, accept| {
            up_to_commit(control, accept);
            answer(control);
        });
        assert_eq!(report.outcome, Outcome::InDoubt, "{}", report.reason);
        assert!(report.reason.contains("Commit was sent and not answered"), "{}", report.reason);
        assert!(source.is_fenced() && world.running().is_empty());
        assert_eq!(world.violations(), Vec::<String>::new());
    }
    // It says that it did not run it: the machine runs here again.
    let (report, world, source) = lying_destination(|control, accept| {
        up_to_commit(control, accept);
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
    let (report, world, source) = lying_destination(|control, accept| {
        control.send(&welcome()).expect("sent");
        assert!(matches!(control.receive("layout"), Ok(Message::Layout { .. })));
        let mut memory = accept(Role::Memory(0));
        memory.send(&welcome()).expect("sent");
        control.send(&Message::Ready).expect("sent");
        let data = std::thread::spawn(move || {
            while let Ok(frame) = memory.next("pages") {
                match frame {
                    migration::transport::channels::Incoming::Pages { length } => {
                        memory.read_pages(length, 256, &mut Forget).expect("pages");
                    }
                    migration::transport::channels::Incoming::Message(Message::RoundEnd { round, .. }) => {
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
