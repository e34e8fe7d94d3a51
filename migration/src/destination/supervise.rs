//! What keeps a post-copy going: sessions one after the other, until everything is here or nothing more will come.
//!
//! A thread of its own supervises the sessions: the one that runs the machine may itself touch a page that is missing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::context::Context;
use super::door::{Newcomer, OpenDoor, gather_one};
use super::postcopy_board::Board;
use super::postcopy_session::{Channels, Event, Session};
use crate::control::Control;
use crate::error::{Doing, MigrationError};
use crate::guest::{DestinationGuest, MachineLayout};
use crate::transport::TransportError;
use crate::transport::channels::Channel;
use crate::transport::tcp::TICK;
use crate::wire::WireError;
use crate::wire::handshake::Role;
use crate::wire::message::Message;
use crate::wire::missing::MissingList;

/// For the channels of a session to follow its fault channel.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(15);
/// If everything is here, for a source that does not know it yet and wants to verify.
const LAST_CALL: Duration = Duration::from_secs(30);

/// What the source has announced before the switchover.
pub(super) struct Awaited {
    list: MissingList,
    part: MissingList,
    channels: Option<Channels>,
}

impl Awaited {
    pub(super) fn new(layout: &MachineLayout) -> Self {
        Self { list: MissingList::none(layout), part: MissingList::none(layout), channels: None }
    }

    /// Takes in a message of a list. True if it was the last one: what it names is forgotten then.
    pub(super) fn take(&mut self, context: &Context, message: &Message) -> Result<bool, MigrationError> {
        if !self.part.take(message)? {
            return Ok(false);
        }
        context.guest.forget_pages(&self.part.pages).doing("forgetting pages that will come again")?;
        self.list.union(&self.part);
        self.part.subtract(&self.list);
        Ok(true)
    }

    /// Whether the session's channels are there.
    pub(super) fn is_attached(&self) -> bool {
        self.channels.is_some()
    }

    /// Attaches the channels of the first session.
    pub(super) fn attach(&mut self, context: &Context, door: &OpenDoor, streams: u16) -> Result<(), MigrationError> {
        let deadline = Instant::now() + ATTACH_TIMEOUT;
        let cancelled = || context.control.is_cancelled();
        let fault = gather_one(door, Role::Fault, deadline, cancelled)?;
        let pushing = pushing(door, streams, !self.list.disks.is_empty(), deadline, cancelled)?;
        self.channels = Some(Channels { fault, pushing });
        Ok(())
    }

    /// Everything that is missing from here on is waited for, and arrives.
    pub(super) fn start(
        self,
        context: &Context,
        layout: &MachineLayout,
        streams: u16,
        door: OpenDoor,
    ) -> Result<Supervised, MigrationError> {
        let early = WireError::Unexpected { found: "State", expected: "the channels of post-copy" };
        let channels = self.channels.ok_or(early)?;
        let board = Arc::new(Board::new(context, &self.list)?);
        let session = Session::start(&board, layout, &context.control, channels);
        let session = session.inspect_err(|_| drop(board.finish()))?;
        let (tell, ending) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let supervisor = Supervisor {
            guest: Arc::clone(&context.guest),
            control: context.control.clone(),
            board,
            layout: layout.clone(),
            streams,
            door,
            recover: context.options.recover,
            shared: Arc::clone(&shared),
        };
        let span = tracing::Span::current();
        let body = move || {
            let _entered = span.enter();
            let _ = tell.send(supervisor.run(session));
        };
        let thread = std::thread::Builder::new()
            .name("post-copy".to_owned())
            .spawn(body)
            .map_err(|error| MigrationError::Options(format!("no thread for post-copy: {error}")))?;
        Ok(Supervised { shared, ending, thread: Some(thread) })
    }
}

fn pushing(
    door: &OpenDoor,
    streams: u16,
    disk: bool,
    deadline: Instant,
    stop: impl Fn() -> bool + Copy,
) -> Result<Vec<Channel>, MigrationError> {
    let roles = (0..streams).map(Role::Memory).chain(disk.then_some(Role::Disk));
    roles.map(|role| gather_one(door, role, deadline, stop)).collect()
}

/// What the supervisor and the thread that runs the machine share.
#[derive(Default)]
struct Shared {
    fate: Mutex<Fate>,
    over: AtomicBool,
}

#[derive(Default)]
struct Fate {
    committed: bool,
    /// A session failed before Commit: the machine must not run.
    failed: Option<MigrationError>,
}

impl Shared {
    fn fate(&self) -> MutexGuard<'_, Fate> {
        self.fate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How post-copy ended.
pub(super) enum Ending {
    /// Everything is here; the channel on which the source can verify, if it is still there.
    Complete(Option<Box<Channel>>),
    /// It will never be. Says what is missing.
    Lost(String),
    /// Before Commit.
    Failed,
}

/// A post-copy under way.
pub(super) struct Supervised {
    shared: Arc<Shared>,
    pub(super) ending: Receiver<Ending>,
    thread: Option<JoinHandle<()>>,
}

impl Supervised {
    /// The machine is about to run: from here on a lost session is waited for.
    pub(super) fn commit(&self) -> Result<(), MigrationError> {
        let mut fate = self.shared.fate();
        match fate.failed.take() {
            Some(error) => Err(error),
            None => {
                fate.committed = true;
                Ok(())
            }
        }
    }

    /// Why it failed before Commit, if it did.
    pub(super) fn failed(&self) -> Option<MigrationError> {
        self.shared.fate().failed.take()
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the supervisor of post-copy panicked");
        }
    }
}

struct Supervisor {
    guest: Arc<dyn DestinationGuest>,
    control: Control,
    board: Arc<Board>,
    layout: MachineLayout,
    streams: u16,
    door: OpenDoor,
    recover: Duration,
    shared: Arc<Shared>,
}

impl Supervisor {
    fn run(self, session: Session) -> Ending {
        let mut session = session;
        loop {
            let (error, next) = match self.watch(session) {
                Watched::Complete(channel) => return Ending::Complete(Some(channel)),
                Watched::Over => return Ending::Failed,
                Watched::Broken(error) => return self.broken(error),
                Watched::Lost(error, next) => (error, next.map(|next| *next)),
            };
            {
                let mut fate = self.shared.fate();
                if !fate.committed {
                    fate.failed = Some(error);
                    // Whoever waits for a page (the restore of a device) goes on, and then sees that it was for nothing.
                    drop(self.board.finish());
                    return Ending::Failed;
                }
            }
            session = match self.recover(&error, next) {
                Ok(session) => session,
                Err(ending) => return ending,
            };
        }
    }

    /// Until the session ends, or the source comes with a new one.
    fn watch(&self, session: Session) -> Watched {
        loop {
            match session.wait() {
                Some(Event::Complete(channel)) => {
                    session.finish();
                    return Watched::Complete(channel);
                }
                Some(Event::Lost(error)) => {
                    session.end();
                    return Watched::Lost(error, None);
                }
                Some(Event::Broken(error)) => {
                    session.end();
                    return Watched::Broken(error);
                }
                None if self.shared.over.load(Ordering::SeqCst) => {
                    session.end();
                    drop(self.board.finish());
                    return Watched::Over;
                }
                None => {}
            }
            if let Some(fault) = self.door.next(Role::Fault) {
                session.end();
                let doing = "a session of post-copy: the source has begun another one";
                return Watched::Lost(TransportError::Closed { doing }.into(), Some(Box::new(fault)));
            }
        }
    }

    /// Waits for the source to come back.
    fn recover(&self, error: &MigrationError, mut next: Option<Newcomer>) -> Result<Session, Ending> {
        let left = self.board.left();
        let complete = self.board.is_complete();
        let (pages, blocks) = left.counts();
        let what =
            format!("{pages} pages and {blocks} blocks ({} MiB) have not arrived", left.bytes().div_ceil(1 << 20));
        let limit = if complete { self.recover.min(LAST_CALL) } else { self.recover };
        let deadline = Instant::now() + limit;
        if !complete {
            let note = format!(
                "the link to the source is lost ({}); {what}: the machine stands still where it needs one, until the source has \
                 reconnected, for which {} s are allowed",
                error.chain(),
                limit.as_secs()
            );
            tracing::warn!("{note}");
            self.control.set_note(Some(note));
        }
        loop {
            if let Some(fault) = next.take().or_else(|| self.door.wait(Role::Fault, TICK)) {
                match self.attach(fault) {
                    Ok(session) => {
                        tracing::info!("post-copy goes on over a new session");
                        self.control.set_note(None);
                        return Ok(session);
                    }
                    Err(error) => tracing::warn!(error = %error.chain(), "no new session yet"),
                }
            }
            let abandoned = self.control.is_abandoned() || self.shared.over.load(Ordering::SeqCst);
            if !abandoned && Instant::now() < deadline {
                continue;
            }
            if complete {
                return Err(Ending::Complete(None));
            }
            let why = if abandoned { "the operator gave it up" } else { "the source did not come back in time" };
            return Err(self.lost(&format!("{what}, and {why} ({})", error.chain())));
        }
    }

    fn attach(&self, newcomer: Newcomer) -> Result<Session, MigrationError> {
        let mut fault = newcomer.welcome()?;
        for message in self.board.left().messages() {
            fault.queue(&message)?;
        }
        fault.flush()?;
        let deadline = Instant::now() + ATTACH_TIMEOUT;
        let stop = || self.shared.over.load(Ordering::SeqCst) || self.door.has_newer_fault();
        let pushing = pushing(&self.door, self.streams, !self.layout.disks.is_empty(), deadline, stop)?;
        Session::start(&self.board, &self.layout, &self.control, Channels { fault, pushing })
    }

    fn broken(&self, error: MigrationError) -> Ending {
        let mut fate = self.shared.fate();
        if fate.committed {
            drop(fate);
            return self.lost(&format!("post-copy cannot go on at this end: {}", error.chain()));
        }
        fate.failed = Some(error);
        drop(self.board.finish());
        Ending::Failed
    }

    /// Stops the machine for good, with words.
    fn lost(&self, why: &str) -> Ending {
        let text = format!(
            "{why}: the machine is stopped here for good; restart it from its disks at the source, or from a backup"
        );
        tracing::error!("{text}");
        self.control.set_note(Some(text.clone()));
        self.guest.lose(&text);
        // Given up for as long as the process lives: if it were dropped, whoever waits for a page (a device, the kernel on its
        // behalf) would go on with zeroes, and could write them to a disk.
        std::mem::forget(Arc::clone(&self.board));
        Ending::Lost(text)
    }
}

enum Watched {
    Complete(Box<Channel>),
    Lost(MigrationError, Option<Box<Newcomer>>),
    Broken(MigrationError),
    Over,
}
