//! One session of post-copy at the source: the fault channel, and the channels that push, each with its thread.
//!
//! The fault thread does nothing but wait for demands and answer them: what it sends is neither behind bulk data in one
//! socket nor held back by the budget, though it is charged to it. A session ends when the destination says that it has
//! everything, or with the first channel that fails; another one then takes its place.

use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::context::{Context, Sent, by_peer};
use super::postcopy_board::Board;
use crate::control::Control;
use crate::error::{Doing, MigrationError};
use crate::guest::{BlockReader, MachineLayout, PAGE_BYTES, SourceGuest};
use crate::page::{Digests, SharedBitmap, digest, is_zero, zero_block};
use crate::transport::TransportError;
use crate::transport::channels::Channel;
use crate::transport::limiter::Limiter;
use crate::transport::pack::Packing;
use crate::transport::stop::Stop;
use crate::transport::tcp::TICK;
use crate::urgency::{Bulk, Turns};
use crate::wire::WireError;
use crate::wire::frame::{PageRun, RunKind};
use crate::wire::handshake::Role;
use crate::wire::message::{Message, PostcopyFigures, Totals};
use crate::wire::missing::MissingList;

const PAGE: usize = PAGE_BYTES as usize;
/// Pages pushed at once: little enough that a demand finds the processor and the link soon.
const PUSH_PAGES: u64 = 32;
/// The destination says something on the fault channel twice a second.
pub(super) const SILENCE: Duration = Duration::from_secs(5);
/// But it begins only when its disks are flushed.
const FIRST_WORD: Duration = Duration::from_secs(60);

/// What all sessions of one post-copy share.
pub(super) struct Work {
    pub(super) board: Board,
    guest: Arc<dyn SourceGuest>,
    layout: MachineLayout,
    held: Arc<SharedBitmap>,
    disks: Vec<Arc<Digests>>,
    limiter: Limiter,
    control: Control,
    stop: Stop,
    /// The guest runs at the destination, or may.
    committed: (Mutex<bool>, Condvar),
    pub(super) memory_bytes: AtomicU64,
    pub(super) disk_bytes: AtomicU64,
}

impl Work {
    pub(super) fn new(context: &Context, sent: &Sent, owed: MissingList) -> Arc<Self> {
        Arc::new(Self {
            board: Board::new(owed),
            guest: Arc::clone(&context.guest),
            layout: sent.layout.clone(),
            held: Arc::clone(&sent.held),
            disks: sent.disks.clone(),
            limiter: Limiter::new(context.control.clone()),
            control: context.control.clone(),
            stop: context.stop.clone(),
            committed: Default::default(),
            memory_bytes: AtomicU64::new(0),
            disk_bytes: AtomicU64::new(0),
        })
    }

    /// Lets the pushing begin: until then it would only take the processors from the switchover, at both hosts.
    pub(super) fn commit(&self) {
        *self.committed.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.committed.1.notify_all();
    }

    fn wait_committed(&self) {
        let committed = self.committed.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = self.committed.1.wait_while(committed, |committed| !*committed);
        drop(wait.unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits for the budget, which what is sent next will be charged to.
    fn wait(&self, channel: &mut Channel) -> Result<(), MigrationError> {
        // A budget is a slow link to those who choose whether to compress.
        channel.held_back(self.limiter.wait(|| self.stop.is_raised()));
        if self.stop.is_raised() { Err(TransportError::Stopped.into()) } else { Ok(()) }
    }

    fn charge(&self, total: &AtomicU64, sent: u64, covered: u64) {
        self.limiter.charge(sent);
        total.fetch_add(sent, Ordering::Relaxed);
        self.control.progress(sent, covered);
    }
}

/// The channels of a session that has not begun.
pub(super) struct Channels {
    pub(super) fault: Channel,
    pub(super) pushing: Vec<Channel>,
}

enum Event {
    Complete(Box<Channel>, PostcopyFigures),
    Pushed,
    Lost(Role, MigrationError),
}

/// A session that has begun.
pub(super) struct Session {
    sockets: Vec<TcpStream>,
    threads: Vec<JoinHandle<()>>,
    events: Receiver<Event>,
}

/// Tells that a thread is gone, also when it panics.
struct Guard {
    role: Role,
    events: Sender<Event>,
    said: bool,
}

impl Guard {
    fn say(mut self, event: Event) {
        self.said = true;
        let _ = self.events.send(event);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.said {
            let _ = self.events.send(Event::Lost(self.role, MigrationError::Bug("post-copy")));
        }
    }
}

impl Session {
    /// Answers demands and pushes from here on.
    pub(super) fn start(work: &Arc<Work>, channels: Channels) -> Result<Self, MigrationError> {
        let (tell, events) = mpsc::channel();
        let mut session = Self { sockets: Vec::new(), threads: Vec::new(), events };
        let Channels { fault, pushing } = channels;
        let mut all = vec![fault];
        all.extend(pushing);
        for channel in all {
            if let Err(error) = session.spawn(work, channel, tell.clone()) {
                work.commit();
                session.end();
                return Err(error);
            }
        }
        Ok(session)
    }

    fn spawn(&mut self, work: &Arc<Work>, mut channel: Channel, events: Sender<Event>) -> Result<(), MigrationError> {
        let role = channel.role();
        self.sockets.push(channel.socket()?);
        let (work, span) = (Arc::clone(work), tracing::Span::current());
        let body = move || {
            let _entered = span.enter();
            let guard = Guard { role, events, said: false };
            if role != Role::Fault {
                Bulk::here();
            }
            let result = match role {
                Role::Fault => answer(&work, &mut channel).map(Some),
                Role::Disk => push_blocks(&work, &mut channel).map(|()| None),
                _ => push_pages(&work, &mut channel).map(|()| None),
            };
            match result {
                Ok(Some(figures)) => guard.say(Event::Complete(Box::new(channel), figures)),
                Ok(None) => {
                    guard.say(Event::Pushed);
                    // Nothing more comes from the destination here; the channel lives as long as its session.
                    let _ = channel.receive("waiting for the end of the session");
                }
                Err(error) => guard.say(Event::Lost(role, error)),
            }
        };
        let thread = std::thread::Builder::new()
            .name(format!("post {role}"))
            .spawn(body)
            .map_err(|error| MigrationError::Options(format!("no thread for the {role} channel: {error}")))?;
        self.threads.push(thread);
        Ok(())
    }

    /// The end of the session, if it comes within a tick: the fault channel, or what went wrong.
    pub(super) fn wait(&self) -> Option<Result<(Channel, PostcopyFigures), MigrationError>> {
        loop {
            match self.events.recv_timeout(TICK) {
                Ok(Event::Complete(channel, figures)) => return Some(Ok((*channel, figures))),
                Ok(Event::Pushed) => {}
                Ok(Event::Lost(role, error)) => {
                    tracing::warn!(%role, error = %error.chain(), "a channel of post-copy failed");
                    return Some(Err(error));
                }
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => return Some(Err(MigrationError::Bug("post-copy"))),
            }
        }
    }

    /// Cuts all channels off and waits for their threads.
    pub(super) fn end(self) {
        for socket in &self.sockets {
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.join();
    }

    /// As [`Session::end`], but leaves the fault channel, which is the first one, alone.
    pub(super) fn finish(mut self) {
        if !self.sockets.is_empty() {
            self.sockets.remove(0);
        }
        self.end();
    }

    fn join(self) {
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a thread of post-copy panicked");
            }
        }
    }
}

/// The fault channel: demands in, pages and blocks out.
fn answer(work: &Work, channel: &mut Channel) -> Result<PostcopyFigures, MigrationError> {
    let mut pages = Pages::new(work, 1);
    let mut disks = Vec::new();
    for number in 0..work.layout.disks.len() {
        disks.push(Blocks::new(work, number)?);
    }
    channel.set_patience(FIRST_WORD);
    loop {
        let message = channel.receive("waiting for what the guest needs").map_err(by_peer)?;
        channel.set_patience(SILENCE);
        match message {
            Message::Demand { disk, number } => {
                work.board.demand(disk, number)?;
                // What is sent beyond the budget holds back all that is pushed.
                let packing = if work.limiter.is_overdrawn() { Packing::Always } else { Packing::Never };
                channel.set_packing(packing);
                match disk.map(usize::from) {
                    None => pages.send(channel, number..number + 1)?,
                    Some(disk) => {
                        let blocks = disks.get_mut(disk).ok_or(MigrationError::Bug("post-copy board"))?;
                        blocks.send(channel, number)?;
                        channel.flush()?;
                    }
                }
            }
            Message::Ping { nonce } => channel.send(&Message::Pong { nonce })?,
            Message::Complete(figures) => {
                channel.send(&Message::CompleteAck)?;
                return Ok(figures);
            }
            other => return Err(WireError::Unexpected { found: other.name(), expected: "Demand" }.into()),
        }
    }
}

fn push_pages(work: &Work, channel: &mut Channel) -> Result<(), MigrationError> {
    let (mut pages, mut turns) = (Pages::new(work, PUSH_PAGES as usize), Turns::new());
    work.wait_committed();
    loop {
        // The budget first: what waits for it must still be there for a demand.
        work.wait(channel)?;
        turns.pass();
        match work.board.next_pages(PUSH_PAGES) {
            Some(run) => pages.send(channel, run)?,
            None => return end_of_push(channel, pages.totals),
        }
    }
}

fn push_blocks(work: &Work, channel: &mut Channel) -> Result<(), MigrationError> {
    let mut totals = Totals::default();
    work.wait_committed();
    for disk in 0..work.layout.disks.len() {
        let mut blocks = Blocks::new(work, disk)?;
        loop {
            work.wait(channel)?;
            let Some(block) = work.board.next_block(disk) else { break };
            blocks.send(channel, block)?;
            channel.flush()?;
        }
        totals.data += blocks.totals.data;
        totals.zero += blocks.totals.zero;
    }
    end_of_push(channel, totals)
}

fn end_of_push(channel: &mut Channel, totals: Totals) -> Result<(), MigrationError> {
    channel.send(&Message::RoundEnd { round: 0, last: true, totals })?;
    channel.set_patience(Duration::from_secs(1 << 32));
    Ok(())
}

/// Pages on their way. The guest is stopped: they can no longer change.
struct Pages<'a> {
    work: &'a Work,
    data: Vec<u8>,
    runs: Vec<PageRun>,
    totals: Totals,
}

impl<'a> Pages<'a> {
    fn new(work: &'a Work, most: usize) -> Self {
        Self { work, data: vec![0; most * PAGE], runs: Vec::new(), totals: Totals::default() }
    }

    fn send(&mut self, channel: &mut Channel, pages: Range<u64>) -> Result<(), MigrationError> {
        let (work, count) = (self.work, (pages.end - pages.start) as usize);
        let buffer = &mut self.data[..count * PAGE];
        work.guest.read_pages(pages.start, buffer).doing("reading guest memory")?;
        self.runs.clear();
        let mut filled = 0;
        for (index, page) in pages.enumerate() {
            let at = index * PAGE..(index + 1) * PAGE;
            let kind = if is_zero(&self.data[at.clone()]) { RunKind::Zero } else { RunKind::Data };
            if kind == RunKind::Zero {
                work.held.remove(page);
            } else {
                work.held.insert(page);
                self.data.copy_within(at, filled * PAGE);
                filled += 1;
            }
            match self.runs.last_mut() {
                Some(run) if run.kind == kind => run.count += 1,
                _ => self.runs.push(PageRun { first: page, count: 1, kind }),
            }
        }
        let sent = channel.send_pages(&self.runs, &self.data[..filled * PAGE])?;
        self.totals.data += filled as u64;
        self.totals.zero += (count - filled) as u64;
        work.charge(&work.memory_bytes, sent, (count * PAGE) as u64);
        Ok(())
    }
}

/// Blocks of one disk on their way.
struct Blocks<'a> {
    work: &'a Work,
    number: usize,
    reader: Box<dyn BlockReader>,
    totals: Totals,
}

impl<'a> Blocks<'a> {
    fn new(work: &'a Work, number: usize) -> Result<Self, MigrationError> {
        let disks = work.guest.disks();
        let disk = disks.get(number).ok_or(MigrationError::Bug("post-copy disk"))?;
        let reader = disk.reader().doing("opening a disk for reading")?;
        Ok(Self { work, number, reader, totals: Totals::default() })
    }

    /// Puts a block behind what is queued on the channel.
    fn send(&mut self, channel: &mut Channel, block: u64) -> Result<(), MigrationError> {
        let (work, number) = (self.work, self.number as u16);
        let length = work.layout.disks[self.number].block_bytes(block);
        self.reader.submit(block).doing("reading a disk")?;
        let mut sent = Err(MigrationError::Bug("disk reader"));
        let totals = &mut self.totals;
        let mut take = |_: u64, bytes: &[u8]| {
            sent = match bytes.get(..length as usize) {
                None => Err(MigrationError::Bug("disk reader: short block")),
                Some(bytes) if is_zero(bytes) => {
                    work.disks[usize::from(number)].set(block, zero_block(length));
                    totals.zero += 1;
                    let message = Message::ZeroBlocks { disk: number, first: block, count: 1 };
                    channel.queue(&message).map(|()| 0).map_err(MigrationError::from)
                }
                Some(bytes) => {
                    work.disks[usize::from(number)].set(block, digest(bytes));
                    totals.data += 1;
                    channel.send_block(number, block, bytes).map_err(MigrationError::from)
                }
            };
        };
        self.reader.complete(&mut take).doing("reading a disk")?;
        work.charge(&work.disk_bytes, sent?, length);
        Ok(())
    }
}

/// A session, and what it shares with those that may follow.
pub(super) struct Running {
    pub(super) session: Session,
    pub(super) work: Arc<Work>,
}

impl Running {
    /// Cuts everything off: before Commit the migration has failed.
    pub(super) fn end(self) {
        self.work.commit();
        self.session.end();
    }
}
