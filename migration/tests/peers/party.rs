//! Peers of our own making: a source that talks to a real destination, and a destination that a real source talks to.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use migration::destination::{DestinationError, Received};
use migration::guest::MachineLayout;
use migration::testing::{FakeMachine, Pair, World, machines};
use migration::transport::TransportError;
use migration::transport::channels::{Channel, PageSink};
use migration::transport::stop::Stop;
use migration::transport::stream::TlsStream;
use migration::transport::tls::{Acceptor, Connector};
use migration::wire::handshake::{Role, Welcome};
use migration::wire::message::Message;

/// For any step of a handshake.
pub const LONG: Duration = Duration::from_secs(5);

/// Pages of the machines here.
pub const PAGES: u64 = 256;

/// A destination that waits, and a source of our own making.
pub struct Victim {
    pub pair: Pair,
    pub world: Arc<World>,
    pub machine: Arc<FakeMachine>,
    pub layout: MachineLayout,
    receiving: JoinHandle<Result<Received, DestinationError>>,
    address: SocketAddr,
}

impl Victim {
    /// Waits for a machine with these disks; `change` may adapt it before that.
    pub fn new(disks: &[u64], change: impl FnOnce(&FakeMachine, &mut Pair)) -> Self {
        let (world, _, machine) = machines(PAGES, disks);
        let mut pair = Pair::new();
        change(&machine, &mut pair);
        let address = pair.address();
        let receiving = pair.receive(&machine);
        Self { pair, world, machine, layout: FakeMachine::layout(PAGES, disks), receiving, address }
    }

    /// A TLS session, over which nothing was said.
    pub fn stream(&self) -> TlsStream {
        let options = &self.pair.source_options;
        let connector = Connector::new(&options.identity, &options.destination_host).expect("a good identity");
        let tcp = TcpStream::connect(self.address).expect("it listens");
        tcp.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
        TlsStream::handshake(connector.session().expect("a session"), tcp, Stop::default(), LONG).expect("TLS")
    }

    /// A channel that was welcomed.
    pub fn open(&self, role: Role) -> Result<Channel, TransportError> {
        let options = &self.pair.source_options;
        Channel::introduce(self.stream(), &options.token, &options.id, role).map(|(channel, _)| channel)
    }

    /// Control, one memory channel and the disk channel, all of them welcomed, and the machine built.
    pub fn ready(&self) -> (Channel, Channel, Channel) {
        let mut control = self.open(Role::Control).expect("welcome");
        control.send(&Message::Layout { layout: self.layout.clone(), streams: 1 }).expect("sent");
        let memory = self.open(Role::Memory(0)).expect("welcome");
        let disk = self.open(Role::Disk).expect("welcome");
        assert_eq!(control.receive("ready").expect("an answer"), Message::Ready);
        (control, memory, disk)
    }

    /// How it ended.
    pub fn ended(self) -> Result<Received, DestinationError> {
        self.receiving.join().expect("it does not panic")
    }

    /// The destination has given up with this in its reason; nothing ever ran.
    pub fn gave_up(self, expected: &str) {
        let (machine, world) = (Arc::clone(&self.machine), Arc::clone(&self.world));
        let error = self.ended().expect_err("nothing arrived").to_string();
        assert!(error.contains(expected), "`{expected}` is not in: {error}");
        assert!(machine.is_discarded());
        assert_eq!((world.running(), world.violations()), (vec![], vec![]));
    }
}

/// Where a destination of our own making waits for a real source.
pub struct Lair {
    listener: TcpListener,
    acceptor: Acceptor,
}

impl Lair {
    /// Has the source of `pair` connect here.
    pub fn new(pair: &mut Pair) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        pair.source_options.address = listener.local_addr().expect("its address");
        // What waits here serves one channel of each kind.
        pair.source_options.limits.streams = 1;
        let acceptor = Acceptor::new(&pair.destination_options.identity, "host-a").expect("a good identity");
        Self { listener, acceptor }
    }

    /// The next channel, which has to be of this role; it is not welcomed.
    pub fn accept(&self, role: Role) -> Channel {
        let channel = self.accept_any();
        assert_eq!(channel.role(), role);
        channel
    }

    /// The next channel; it is not welcomed.
    pub fn accept_any(&self) -> Channel {
        let (tcp, _) = self.listener.accept().expect("the source connects");
        tcp.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
        let session = self.acceptor.session().expect("a session");
        let stream = TlsStream::handshake(session, tcp, Stop::default(), LONG).expect("TLS");
        let mut channel = Channel::new(stream, Role::Control);
        match channel.receive("a hello") {
            Ok(Message::Hello(hello)) => channel.into_role(hello.role),
            other => panic!("{other:?} instead of a hello"),
        }
    }

    /// The same, and welcomes it.
    pub fn welcome(&self, role: Role, features: &[&str]) -> Channel {
        let mut channel = self.accept(role);
        channel.send(&welcome(features)).expect("sent");
        channel
    }
}

/// The answer to a hello.
pub fn welcome(features: &[&str]) -> Message {
    let features = features.iter().map(|&name| name.to_owned()).collect();
    Message::Welcome(Welcome { version: 1, features, extension: Vec::new() })
}

/// Pages that are not kept.
pub struct Forget;

impl PageSink for Forget {
    type Error = TransportError;

    fn store(&mut self, _: u64, _: &[u8]) -> Result<(), TransportError> {
        Ok(())
    }

    fn apply(&mut self, _: u64, _: &[u8]) -> Result<(), TransportError> {
        Ok(())
    }

    fn zero(&mut self, _: std::ops::Range<u64>) -> Result<(), TransportError> {
        Ok(())
    }
}
