//! Who connects, and may it?
//!
//! Whoever does not prove itself is dropped, and the destination goes on waiting: a port scan, a stranger's certificate or
//! an old token must not end a migration. Each newcomer has a thread of its own for its handshake, a few at most, each with
//! a deadline; none of them reaches the frame parser before TLS has accepted its certificate and name.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::arrivals::FOREVER;
use super::context::{Context, DestinationOptions};
use crate::error::MigrationError;
use crate::policy::Limits;
use crate::transport::TransportError;
use crate::transport::channels::{Channel, MAX_HELLO};
use crate::transport::stop::Stop;
use crate::transport::stream::TlsStream;
use crate::transport::tcp::{self, TICK};
use crate::transport::tls::Acceptor;
use crate::wire::WireError;
use crate::wire::handshake::{Hello, MAGIC, Role, Welcome, proves};
use crate::wire::message::{Message, sanitised};
use crate::wire::version::{NEWEST, OLDEST, POSTCOPY, REUSE, agree, common};

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
/// For a refusal to reach its reader.
const LINGER: Duration = Duration::from_millis(300);

/// A connection that has proved itself; it is not welcomed yet.
pub(super) struct Newcomer {
    pub(super) channel: Channel,
    pub(super) welcome: Welcome,
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
    pub(super) newcomers: Receiver<Newcomer>,
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

/// Opens the door: a thread of its own lets connections in until the second value is dropped.
pub(super) fn open_door(context: &Context, listener: TcpListener) -> Result<(Arc<Door>, OpenDoor), MigrationError> {
    let acceptor = Acceptor::new(&context.options.identity, &context.options.source_host)?;
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
    let open = OpenDoor { newcomers, waiting: RefCell::default(), closed: Stop::new(&context.control) };
    let (keeper, closed) = (Arc::clone(&door), open.closed.clone());
    // Closed when nobody can come any more: in post-copy that is late.
    let until = Instant::now() + FOREVER;
    let keep = move || keeper.keep(&listener, until, &closed);
    std::thread::Builder::new()
        .name("accept".to_owned())
        .spawn(keep)
        .map_err(|error| MigrationError::Options(format!("no thread to listen with: {error}")))?;
    Ok((door, open))
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

/// Sends a connection away with a reason.
pub(super) fn refuse(mut channel: Channel, reason: &str) {
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
pub(super) struct Door {
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

    /// What went wrong with the last connection.
    pub(super) fn last_refusal(&self) -> String {
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
