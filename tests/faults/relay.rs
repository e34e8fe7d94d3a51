//! A relay between two VMMs that stops a migration at one message.
//!
//! The destination's VMM listens on its own loopback, and the source's connects to the same address on its own: there the relay
//! waits. It sees TLS records only, and knows the messages by their length and order; those that it does not look for pass.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hostd::lab::LabHost;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Where both VMMs believe that the other one is.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 9);

/// Ports that the destination's kernel gives to a listener: the relay has to wait on all of them beforehand.
const PORTS: std::ops::Range<u16> = 20_000..20_128;

/// Bytes of an encrypted record with a message that carries nothing (Ready, Commit), and one small number (Ping, Pong, RoundAck):
/// frame header, variant, content type and authentication tag (RFC 8446, section 5.2).
const BARE: usize = 16 + 1 + 1 + 16;
const SMALL: usize = BARE + 1;

/// Application data.
const DATA: u8 = 23;

/// A message that is held on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boundary {
    /// The first data channel: the layout has been read.
    Attach,
    Ready,
    RoundAck,
    /// Only by post-copy.
    PostcopyPrepare,
    PostcopyReady,
    /// Only by pre-copy.
    State,
    Prepared,
    Commit,
    Resumed,
    Verified,
}

impl Boundary {
    /// In order of time.
    pub const ALL: [Boundary; 10] = [
        Boundary::Attach,
        Boundary::Ready,
        Boundary::RoundAck,
        Boundary::PostcopyPrepare,
        Boundary::PostcopyReady,
        Boundary::State,
        Boundary::Prepared,
        Boundary::Commit,
        Boundary::Resumed,
        Boundary::Verified,
    ];
}

/// What becomes of a message that was held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// It and everything after it passes.
    Deliver,
    /// It is lost, and so is every connection.
    Cut,
}

#[derive(Default)]
struct Held {
    /// Messages to be held, one after the other.
    wanted: VecDeque<Boundary>,
    connections: usize,
    /// The migration goes by post-copy.
    postcopy: bool,
    /// Ready has passed on the control channel.
    ready: bool,
    /// Messages after it that were not pings: by the source, by the destination.
    source_said: usize,
    committed: bool,
    destination_said: usize,
    reached: bool,
    release: Option<Release>,
    sockets: Vec<TcpStream>,
}

#[derive(Default)]
struct Shared {
    held: Mutex<Held>,
    changed: Condvar,
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running relay; it ends with the test.
pub struct Relay {
    shared: Arc<Shared>,
}

impl Relay {
    /// Relays from `source` to `destination`, whose daemon must not have started a VMM yet.
    pub fn start(source: &LabHost, destination: &LabHost) -> Self {
        let range = format!("{} {}", PORTS.start, PORTS.end - 1);
        let set = || std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", &range);
        destination.namespace().run(set).unwrap().expect("a range of ports");
        let bind = || PORTS.map(|port| TcpListener::bind((ADDRESS, port)).expect("a free port")).collect();
        let listeners: Vec<TcpListener> = source.namespace().run(bind).unwrap();
        let shared = Arc::new(Shared::default());
        let (state, there) = (Arc::clone(&shared), destination.namespace().name().to_owned());
        std::thread::spawn(move || {
            // What is connected from this thread is connected there.
            hostd::lab::namespace::Namespace::open(&there)
                .and_then(|namespace| namespace.enter())
                .expect("the namespace");
            accept(&listeners, &state);
        });
        Self { shared }
    }

    /// The next migration is held at each of these, in their order.
    pub fn arm(&self, boundaries: &[Boundary], postcopy: bool) {
        *self.shared.held() = Held { wanted: boundaries.iter().copied().collect(), postcopy, ..Held::default() };
    }

    /// Waits until the message is held. False if it never came.
    pub fn wait(&self, at_most: Duration) -> bool {
        let waited = self.shared.changed.wait_timeout_while(self.shared.held(), at_most, |held| !held.reached);
        waited.unwrap_or_else(PoisonError::into_inner).0.reached
    }

    /// Lets it go, or lets everything go to waste.
    pub fn release(&self, release: Release) {
        let mut held = self.shared.held();
        (held.release, held.reached) = (Some(release), false);
        if release == Release::Cut {
            held.wanted.clear();
            for socket in held.sockets.drain(..) {
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
        self.shared.changed.notify_all();
    }
}

fn accept(listeners: &[TcpListener], shared: &Arc<Shared>) {
    loop {
        let mut fds: Vec<PollFd<'_>> =
            listeners.iter().map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN)).collect();
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
        for listener in listeners.iter().zip(ready).filter_map(|(listener, ready)| ready.then_some(listener)) {
            let Ok((source, _)) = listener.accept() else { continue };
            let Ok(target) = listener.local_addr().and_then(TcpStream::connect) else { continue };
            let _ = (source.set_nodelay(true), target.set_nodelay(true));
            let number = {
                let mut held = shared.held();
                held.sockets.extend([source.try_clone(), target.try_clone()].into_iter().flatten());
                held.connections += 1;
                held.connections - 1
            };
            for to_destination in [true, false] {
                let (Ok(source), Ok(target)) = (source.try_clone(), target.try_clone()) else { return };
                let (from, to) = if to_destination { (source, target) } else { (target, source) };
                let shared = Arc::clone(shared);
                std::thread::spawn(move || relay(from, to, number, to_destination, &shared));
            }
        }
    }
}

fn relay(mut from: TcpStream, mut to: TcpStream, number: usize, to_destination: bool, shared: &Shared) {
    let mut record = Vec::new();
    loop {
        record.resize(5, 0);
        if from.read_exact(&mut record).is_err() {
            break;
        }
        let (kind, length) = (record[0], usize::from(u16::from_be_bytes([record[3], record[4]])));
        record.resize(5 + length, 0);
        if from.read_exact(&mut record[5..]).is_err() || !passes(shared, number, to_destination, kind, length) {
            break;
        }
        if to.write_all(&record).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Which message a record of the control channel, or of the first memory channel, begins; nothing if it is none of those.
fn message(held: &mut Held, number: usize, to_destination: bool, kind: u8, length: usize) -> Option<Boundary> {
    match (number, to_destination) {
        (1, true) if kind != DATA => Some(Boundary::Attach),
        (1, false) if kind == DATA && length == SMALL => Some(Boundary::RoundAck),
        (0, false) if kind == DATA && !held.ready => {
            held.ready = length == BARE;
            held.ready.then_some(Boundary::Ready)
        }
        (0, true) if kind == DATA && held.ready && length != SMALL => {
            held.source_said += 1;
            match (held.source_said, held.postcopy, length) {
                (1, true, _) => Some(Boundary::PostcopyPrepare),
                (1, false, _) => Some(Boundary::State),
                (_, _, BARE) => {
                    held.committed = true;
                    Some(Boundary::Commit)
                }
                _ => None,
            }
        }
        // After Commit nobody pings, and Resumed is as small if the resume took less than 128 us.
        (0, false) if kind == DATA && (length != SMALL || held.committed) => {
            held.destination_said += 1;
            let said = [Boundary::PostcopyReady, Boundary::Prepared, Boundary::Resumed, Boundary::Verified];
            let first = usize::from(!held.postcopy);
            said.get(first + held.destination_said - 1).copied()
        }
        _ => None,
    }
}

/// Holds the message that is wanted. False if it is not to be delivered.
fn passes(shared: &Shared, number: usize, to_destination: bool, kind: u8, length: usize) -> bool {
    let mut held = shared.held();
    let found = message(&mut held, number, to_destination, kind, length);
    if found.is_none() || found != held.wanted.front().copied() {
        return true;
    }
    held.reached = true;
    shared.changed.notify_all();
    let released = shared.changed.wait_while(held, |held| held.release.is_none());
    let mut held = released.unwrap_or_else(PoisonError::into_inner);
    held.wanted.pop_front();
    held.release.take() == Some(Release::Deliver)
}
