//! Handshake: who connects, and may it?
//!
//! Whoever does not prove itself is dropped, and the destination goes on waiting: a port scan, a stranger's certificate or
//! an old token must not end a migration. Each newcomer has a thread of its own for its handshake, a few at most, each with
//! a deadline; none of them reaches the frame parser before TLS has accepted its certificate and name.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::receive::{FOREVER, Link, Precopy};
use super::{Context, DestinationOptions, Failed};
use crate::error::{Doing, MigrationError};
use crate::guest::MachineLayout;
use crate::policy::Limits;
use crate::transport::TransportError;
use crate::transport::channels::{Channel, MAX_HELLO};
use crate::transport::stream::{Stop, TlsStream};
use crate::transport::tcp::{self, TICK};
use crate::transport::tls::Acceptor;
use crate::wire::handshake::{Hello, MAGIC, Role, Welcome, proves};
use crate::wire::message::{Message, sanitised};
use crate::wire::version::{NEWEST, OLDEST, POSTCOPY, REUSE, agree, common};
use crate::wire::{WireError, layout};

/// For TLS and hello of one connection.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections in their handshake at the same time; more are dropped.
const MAX_HALF_OPEN: usize = 8;
/// Connections that have proved themselves and wait for their turn; more are refused. A source opens four at a time and
/// waits for their welcomes, and the door stays open for as long as post-copy is possible: without a bound a hostile one could
/// pile up sessions of a quarter of a megabyte each.
const MAX_PROVED: usize = 8;
/// Refusals that are logged one by one; of more only each power of two, so that strangers cannot fill a disk with them.
const REFUSALS_LOGGED: u64 = 64;
/// For all data channels to be connected after the layout has arrived.
const CHANNELS_TIMEOUT: Duration = Duration::from_secs(15);
/// For a refusal to reach its reader.
const LINGER: Duration = Duration::from_millis(300);

/// A connection that has proved itself; it is not welcomed yet.
pub(super) struct Newcomer {
    channel: Channel,
    welcome: Welcome,
}

impl Newcomer {
    /// Welcomes it.
    pub(super) fn welcome(mut self) -> Result<Channel, MigrationError> {
        self.channel.send(&Message::Welcome(self.welcome))?;
        Ok(self.channel)
    }
}

/// Where connections that have proved themselves come in, as long as it lives.
pub(super) struct OpenDoor {
    newcomers: Receiver<Newcomer>,
    /// Newcomers whose turn has not come.
    waiting: RefCell<VecDeque<Newcomer>>,
    closed: Stop,
}

impl Drop for OpenDoor {
    fn drop(&mut self) {
        self.closed.raise();
    }
}

impl OpenDoor {
    fn fetch(&self) {
        self.newcomers.try_iter().for_each(|newcomer| self.keep(newcomer));
    }

    /// At most one for each role: a source that comes again in the same role has lost the connection that it had.
    fn keep(&self, newcomer: Newcomer) {
        let role = newcomer.channel.role();
        let mut waiting = self.waiting.borrow_mut();
        waiting.retain(|known| known.channel.role() != role);
        if role == Role::Control {
            refuse(newcomer.channel, "there is a control channel already");
        } else {
            waiting.push_back(newcomer);
        }
    }

    /// The newcomer in this role, if there is one.
    pub(super) fn next(&self, role: Role) -> Option<Newcomer> {
        self.fetch();
        let mut waiting = self.waiting.borrow_mut();
        let at = waiting.iter().position(|known| known.channel.role() == role)?;
        waiting.remove(at)
    }

    /// The same, and waits for it.
    pub(super) fn wait(&self, role: Role, at_most: Duration) -> Option<Newcomer> {
        self.next(role).or_else(|| {
            let newcomer = self.newcomers.recv_timeout(at_most).ok()?;
            self.keep(newcomer);
            self.next(role)
        })
    }

    /// Whether the source has begun another session meanwhile.
    pub(super) fn has_newer_fault(&self) -> bool {
        self.fetch();
        self.waiting.borrow().iter().any(|known| known.channel.role() == Role::Fault)
    }
}

/// Waits for one channel of a session, and welcomes it.
pub(super) fn gather_one(
    door: &OpenDoor,
    role: Role,
    deadline: Instant,
    stop: impl Fn() -> bool,
) -> Result<Channel, MigrationError> {
    let start = Instant::now();
    loop {
        if let Some(newcomer) = door.wait(role, TICK) {
            return newcomer.welcome();
        }
        if stop() {
            return Err(TransportError::Stopped.into());
        }
        if Instant::now() > deadline {
            let after = start.elapsed();
            return Err(TransportError::Silent { doing: "waiting for the channels of a session", after }.into());
        }
    }
}

pub(super) fn listen(context: &mut Context, listener: TcpListener) -> Result<Precopy, Box<Failed>> {
    let acceptor = Acceptor::new(&context.options.identity, &context.options.source_host)
        .map_err(|error| Failed::new(error, None))?;
    let (found, newcomers) = mpsc::sync_channel(MAX_PROVED);
    let door = Arc::new(Door {
        acceptor,
        options: context.options.clone(),
        postcopy: offers_postcopy(context),
        stop: context.stop.clone(),
        half_open: AtomicUsize::new(0),
        refusals: Mutex::default(),
        found,
        span: tracing::Span::current(),
    });
    let closed = Stop::new(&context.control);
    let deadline = Instant::now() + context.options.deadline;
    let keeper = {
        let (door, closed) = (Arc::clone(&door), closed.clone());
        // Closed when nobody can come any more: in post-copy that is late.
        let until = Instant::now() + FOREVER;
        std::thread::Builder::new().name("accept".to_owned()).spawn(move || door.keep(&listener, until, &closed))
    };
    if let Err(error) = keeper {
        return Err(Failed::new(MigrationError::Options(format!("no thread to listen with: {error}")), None));
    }
    let result = first(context, &newcomers, deadline, &door).map_err(|error| Failed::new(error, None));
    let door = OpenDoor { newcomers, waiting: RefCell::default(), closed };
    result.and_then(|newcomer| attach(context, newcomer, door))
}

fn offers_postcopy(context: &Context) -> bool {
    match context.guest.postcopy() {
        Ok(()) => true,
        Err(error) => {
            tracing::info!(why = %error, "post-copy is not offered");
            false
        }
    }
}

/// Waits for the control channel.
fn first(
    context: &Context,
    newcomers: &Receiver<Newcomer>,
    deadline: Instant,
    door: &Door,
) -> Result<Newcomer, MigrationError> {
    loop {
        if context.control.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        match newcomers.recv_timeout(left.min(TICK)) {
            Ok(newcomer) if newcomer.channel.role() == Role::Control => return Ok(newcomer),
            Ok(newcomer) => refuse(newcomer.channel, "the control channel has to come first"),
            Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                return Err(MigrationError::NobodyCame { after: context.options.deadline, last: door.last_refusal() });
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(MigrationError::Bug("listener")),
        }
    }
}

/// Welcomes the control channel, learns the layout, gathers the data channels, builds the machine.
fn attach(context: &mut Context, newcomer: Newcomer, door: OpenDoor) -> Result<Precopy, Box<Failed>> {
    let Newcomer { channel, welcome } = newcomer;
    let mut link = match Link::new(channel, context) {
        Ok(link) => link,
        Err(error) => return Err(Failed::new(error, None)),
    };
    let postcopy = welcome.features.iter().any(|name| name == POSTCOPY);
    match agree_on_machine(context, &mut link, welcome, &door.newcomers) {
        Ok(layout) => {
            link.door = postcopy.then_some(door);
            Ok(Precopy::new(link, layout))
        }
        Err(error) => Err(Failed::new(error, Some(link))),
    }
}

fn agree_on_machine(
    context: &mut Context,
    link: &mut Link,
    welcome: Welcome,
    newcomers: &Receiver<Newcomer>,
) -> Result<MachineLayout, MigrationError> {
    link.control.send(&Message::Welcome(welcome))?;
    let (layout, streams) = match link.control.receive("waiting for the machine's layout")? {
        Message::Layout { layout, streams } => (layout, streams),
        other => return Err(WireError::Unexpected { found: other.name(), expected: "Layout" }.into()),
    };
    layout::check(&layout, streams)?;
    link.streams = streams;
    // The machine is built while channels come; each takes some milliseconds.
    let (built, channels) = std::thread::scope(|scope| {
        let guest = &context.guest;
        let build = scope.spawn(|| guest.prepare(&layout).doing("building the machine"));
        let channels = gather(context, newcomers, streams, !layout.disks.is_empty());
        (build.join().unwrap_or(Err(MigrationError::Bug("building the machine"))), channels)
    });
    built?;
    let channels = channels?;
    link.start(context, &layout, channels)?;
    link.control.send(&Message::Ready)?;
    tracing::info!(machine = %layout.machine, pages = layout.pages(), disks = layout.disks.len(), streams, "ready to receive");
    Ok(layout)
}

/// Waits for all data channels; a second one in the same role is refused, and the first one stays.
fn gather(
    context: &Context,
    newcomers: &Receiver<Newcomer>,
    streams: u16,
    disk: bool,
) -> Result<Vec<Channel>, MigrationError> {
    let expected = usize::from(streams) + usize::from(disk);
    let deadline = Instant::now() + CHANNELS_TIMEOUT.min(context.options.deadline);
    let mut channels: Vec<Channel> = Vec::new();
    while channels.len() < expected {
        if context.control.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let Newcomer { mut channel, welcome } = match newcomers.recv_timeout(left.min(TICK)) {
            Ok(newcomer) => newcomer,
            Err(RecvTimeoutError::Timeout) if !left.is_zero() => continue,
            Err(_) => {
                let after = CHANNELS_TIMEOUT.min(context.options.deadline);
                return Err(MigrationError::ChannelsMissing { attached: channels.len(), expected, after });
            }
        };
        let role = channel.role();
        let wanted = match role {
            Role::Control => false,
            Role::Memory(number) => number < streams,
            Role::Disk => disk,
            Role::Fault => false,
        };
        if !wanted {
            refuse(channel, &format!("no {role} channel was announced"));
        } else if channels.iter().any(|known| known.role() == role) {
            refuse(channel, &format!("there is a {role} channel already"));
        } else if let Err(error) = channel.send(&Message::Welcome(welcome)) {
            tracing::warn!(%role, %error, "a channel was lost before it was welcomed");
        } else {
            channels.push(channel);
        }
    }
    Ok(channels)
}

fn refuse(mut channel: Channel, reason: &str) {
    tracing::warn!(role = %channel.role(), reason, "connection refused");
    channel.abort(reason);
    channel.close();
}

/// Connections that were refused.
#[derive(Default)]
struct Refusals {
    count: u64,
    last: String,
}

/// Where connections come in.
struct Door {
    acceptor: Acceptor,
    options: DestinationOptions,
    /// This host can do post-copy.
    postcopy: bool,
    stop: Stop,
    half_open: AtomicUsize,
    refusals: Mutex<Refusals>,
    found: SyncSender<Newcomer>,
    span: tracing::Span,
}

impl Door {
    fn keep(self: Arc<Self>, listener: &TcpListener, until: Instant, closed: &Stop) {
        let _entered = self.span.enter();
        loop {
            match tcp::accept(listener, until, || closed.is_raised()) {
                Ok(Some((tcp, peer))) => self.admit(tcp, peer),
                Ok(None) => return,
                Err(error) => {
                    self.note(format!("the listener itself failed: {error}"));
                    return;
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, tcp: TcpStream, peer: SocketAddr) {
        if self.half_open.fetch_add(1, Ordering::SeqCst) >= MAX_HALF_OPEN {
            self.half_open.fetch_sub(1, Ordering::SeqCst);
            self.note(format!("{peer} dropped: {MAX_HALF_OPEN} connections are in their handshake already"));
            return;
        }
        let door = Arc::clone(self);
        let work = move || {
            let _entered = door.span.enter();
            match door.examine(tcp) {
                Ok(newcomer) => door.show_in(newcomer, peer),
                Err(error) => door.note(format!("{peer}: {}", error.chain())),
            }
            door.half_open.fetch_sub(1, Ordering::SeqCst);
        };
        if let Err(error) = std::thread::Builder::new().name("handshake".to_owned()).spawn(work) {
            self.half_open.fetch_sub(1, Ordering::SeqCst);
            self.note(format!("{peer} dropped: no thread for its handshake: {error}"));
        }
    }

    fn show_in(&self, newcomer: Newcomer, peer: SocketAddr) {
        match self.found.try_send(newcomer) {
            // The receiver is gone once all channels are there.
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(newcomer)) => {
                let reason = format!("{MAX_PROVED} connections of this migration wait for their turn already");
                self.note(format!("{peer}: {reason}"));
                refuse(newcomer.channel, &reason);
            }
        }
    }

    fn note(&self, text: String) {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        refusals.count += 1;
        if refusals.count <= REFUSALS_LOGGED || refusals.count.is_power_of_two() {
            tracing::warn!(refused = refusals.count, "connection refused: {text}");
        }
        refusals.last = text;
    }

    fn last_refusal(&self) -> String {
        let refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        if refusals.count == 0 { "there was none".to_owned() } else { refusals.last.clone() }
    }

    /// TLS, name, hello, proof.
    fn examine(&self, tcp: TcpStream) -> Result<Newcomer, MigrationError> {
        let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
        let last_words = tcp.try_clone();
        let stream = TlsStream::handshake(self.acceptor.session()?, tcp, self.stop.clone(), HANDSHAKE_TIMEOUT);
        let mut stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                // The alert that tells the peer why is on its way: do not let a reset overtake it.
                if let Ok(socket) = last_words {
                    tcp::linger(&socket, LINGER);
                }
                return Err(error.into());
            }
        };
        if let Err(error) = self.acceptor.check_name(stream.peer_certificate()) {
            let mut channel = Channel::new(stream, Role::Control);
            channel.abort(&format!("this host expects another source: {error}"));
            channel.linger(LINGER);
            return Err(error.into());
        }
        stream.set_deadline(Some(deadline));
        let session = stream.session_key();
        let mut channel = Channel::new(stream, Role::Control);
        match self.hello(&mut channel, &session) {
            Ok((role, welcome)) => Ok(Newcomer { channel: channel.into_role(role), welcome }),
            Err(error) => {
                channel.abort(&error.chain());
                channel.linger(LINGER);
                Err(error)
            }
        }
    }

    fn hello(&self, channel: &mut Channel, session: &[u8; 32]) -> Result<(Role, Welcome), MigrationError> {
        let hello = match channel.receive_within(MAX_HELLO, "waiting for a hello")? {
            Message::Hello(hello) => hello,
            other => return Err(WireError::Unexpected { found: other.name(), expected: "Hello" }.into()),
        };
        let Hello { magic, versions, features, id, role, proof, .. } = hello;
        if magic != MAGIC {
            return Err(TransportError::Wire(WireError::Malformed {
                kind: "hello",
                detail: "it does not begin as a migration does".to_owned(),
            })
            .into());
        }
        let version = agree((OLDEST, NEWEST), versions)?;
        let options = &self.options;
        if id != options.id {
            let text = format!("this port waits for another migration than `{}`: start it again", sanitised(&id));
            return Err(MigrationError::Options(text));
        }
        if !proves(&proof, &options.token, session, &id, role) {
            let text =
                "the one-time token is not the right one, or was used in another session: start the migration again";
            return Err(MigrationError::Options(text.to_owned()));
        }
        if matches!(role, Role::Memory(number) if number >= Limits::MAX_STREAMS) {
            let text =
                format!("there is no {role} channel in any migration: 0 to {} are possible", Limits::MAX_STREAMS - 1);
            return Err(MigrationError::Options(text));
        }
        let mut features = common(&features);
        features.retain(|name| match name.as_str() {
            POSTCOPY => self.postcopy,
            REUSE => options.reuse,
            _ => true,
        });
        Ok((role, Welcome { version, features, extension: Vec::new() }))
    }
}
