//! A scripted machine with disks over plain vectors, with an oracle for what its guest has written, an observer that
//! notices if it runs in two places, and faults on demand: for the tests of this crate and of those that use it.

mod absent;
mod certificates;
mod disk;
mod faults;
mod machine;
mod memory;
mod proxy;
mod verdict;
mod workload;

pub use absent::Absent;
pub use certificates::Authority;
pub use disk::FakeDisk;
pub use faults::Faults;
pub use machine::{FakeMachine, World};
pub use memory::FakeMemory;
pub use proxy::{Cut, Proxy};
pub use verdict::{Owner, settle};
pub use workload::{Registers, Workload};

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use crate::control::Control;
use crate::destination::{self, DestinationError, DestinationOptions, Received};
use crate::policy::Limits;
use crate::report::{Report, Trigger};
use crate::source::{self, SourceOptions};

/// Two machines of the same layout, on hosts `a` and `b`, and the world that watches them.
pub fn machines(pages: u64, disks: &[u64]) -> (Arc<World>, Arc<FakeMachine>, Arc<FakeMachine>) {
    let world = World::new();
    let layout = FakeMachine::layout(pages, disks);
    let source = FakeMachine::new("a", layout.clone(), &world);
    let destination = FakeMachine::new("b", layout, &world);
    (world, source, destination)
}

/// Both ends of one migration between two fake machines, over real TCP and TLS on the loopback.
pub struct Pair {
    /// Of the authority of both.
    pub authority: Authority,
    /// What the source is told.
    pub source_options: SourceOptions,
    /// What the destination is told.
    pub destination_options: DestinationOptions,
    /// Steers the source.
    pub source_control: Control,
    /// Steers the destination.
    pub destination_control: Control,
    listener: Option<TcpListener>,
}

impl Pair {
    /// A migration from host `a` to host `b`.
    pub fn new() -> Self {
        Self::under(Authority::new())
    }

    /// The same under an authority that is there already.
    pub fn under(authority: Authority) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port on the loopback");
        let address = listener.local_addr().expect("the address of a bound socket");
        let source_options = SourceOptions {
            id: "test-1".to_owned(),
            address,
            token: [7; 32],
            source_host: "host-a".to_owned(),
            destination_host: "host-b".to_owned(),
            identity: authority.issue("host-a"),
            limits: Limits::default(),
            trigger: Trigger::default(),
        };
        let destination_options = DestinationOptions {
            id: "test-1".to_owned(),
            token: [7; 32],
            source_host: "host-a".to_owned(),
            destination_host: "host-b".to_owned(),
            identity: authority.issue("host-b"),
            deadline: Duration::from_secs(5),
            recover: Duration::from_secs(20),
            reuse: false,
        };
        Self {
            authority,
            source_options,
            destination_options,
            source_control: Control::new(),
            destination_control: Control::new(),
            listener: Some(listener),
        }
    }

    /// Where the destination listens.
    pub fn address(&self) -> SocketAddr {
        self.listener.as_ref().and_then(|listener| listener.local_addr().ok()).unwrap_or(self.source_options.address)
    }

    /// Starts the destination alone.
    pub fn receive(
        &mut self,
        destination: &Arc<FakeMachine>,
    ) -> std::thread::JoinHandle<Result<Received, DestinationError>> {
        let listener = self.listener.take().expect("a pair is used once");
        let (guest, options, control) =
            (Arc::clone(destination), self.destination_options.clone(), self.destination_control.clone());
        std::thread::spawn(move || destination::run(guest, listener, options, &control))
    }

    /// Runs the source alone.
    pub fn send(&self, source: &Arc<FakeMachine>) -> Report {
        source::run(Arc::clone(source) as _, self.source_options.clone(), &self.source_control)
    }

    /// Runs both ends to their end.
    pub fn run(
        mut self,
        source: &Arc<FakeMachine>,
        destination: &Arc<FakeMachine>,
    ) -> (Report, Result<Received, DestinationError>) {
        let receiving = self.receive(destination);
        let report = self.send(source);
        (report, receiving.join().expect("the destination does not panic"))
    }
}

impl Default for Pair {
    fn default() -> Self {
        Self::new()
    }
}
