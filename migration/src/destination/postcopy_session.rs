//! One session of post-copy at the destination: the fault thread, and one for each channel that is pushed to.
//!
//! The fault thread waits for two things at once, faults of the guest and answers of the source, so that many faults can be
//! under way. It never touches guest memory itself: pages go in through [`Missing`](crate::guest::Missing) alone.

use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::arrivals::{FOREVER, check_totals};
use super::context::by_peer;
use super::postcopy_board::Board;
use crate::control::Control;
use crate::error::MigrationError;
use crate::guest::{MachineLayout, PAGE_BYTES};
use crate::transport::TransportError;
use crate::transport::channels::{Channel, Incoming, PageSink};
use crate::transport::tcp::TICK;
use crate::urgency::{Bulk, Turns};
use crate::wire::WireError;
use crate::wire::handshake::Role;
use crate::wire::message::{Message, Totals};

/// The source hears from this end at least so often.
const PING: Duration = Duration::from_millis(500);
/// And answers.
const SILENCE: Duration = Duration::from_secs(5);

/// The channels of a session that has not begun.
pub(super) struct Channels {
    pub(super) fault: Channel,
    pub(super) pushing: Vec<Channel>,
}

/// What happened to a session.
pub(super) enum Event {
    /// Everything is here, and the source knows: the fault channel is free.
    Complete(Box<Channel>),
    /// A channel failed; another session can take over.
    Lost(MigrationError),
    /// This end failed: the machine cannot go on.
    Broken(MigrationError),
}

/// A session that has begun.
pub(super) struct Session {
    sockets: Vec<TcpStream>,
    threads: Vec<JoinHandle<()>>,
    events: Receiver<Event>,
}

/// What the threads of a session need.
struct Work {
    board: Arc<Board>,
    layout: MachineLayout,
    control: Control,
    /// Written to when the last page has come by a push channel.
    bell: UnixStream,
}

/// Tells that a thread is gone, also when it panics.
struct Guard {
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
            let _ = self.events.send(Event::Broken(MigrationError::Bug("post-copy")));
        }
    }
}

fn event(role: Role, error: MigrationError) -> Event {
    tracing::warn!(%role, error = %error.chain(), "a channel of post-copy failed");
    match error {
        MigrationError::Guest { .. } | MigrationError::Bug(_) => Event::Broken(error),
        error => Event::Lost(error),
    }
}

impl Session {
    pub(super) fn start(
        board: &Arc<Board>,
        layout: &MachineLayout,
        control: &Control,
        channels: Channels,
    ) -> Result<Self, MigrationError> {
        let io = |source| TransportError::Io { doing: "making a pair of sockets", source };
        let (bell, listener) = UnixStream::pair().map_err(io)?;
        bell.set_nonblocking(true).and_then(|()| listener.set_nonblocking(true)).map_err(io)?;
        let work = Work { board: Arc::clone(board), layout: layout.clone(), control: control.clone(), bell };
        let work = Arc::new(work);
        let (tell, events) = mpsc::channel();
        let mut session = Self { sockets: Vec::new(), threads: Vec::new(), events };
        let Channels { fault, pushing } = channels;
        let mut result = session.spawn(&work, fault, Some(listener), tell.clone());
        for channel in pushing {
            result = result.and_then(|()| session.spawn(&work, channel, None, tell.clone()));
        }
        match result {
            Ok(()) => Ok(session),
            Err(error) => {
                session.end();
                Err(error)
            }
        }
    }

    fn spawn(
        &mut self,
        work: &Arc<Work>,
        mut channel: Channel,
        bell: Option<UnixStream>,
        events: Sender<Event>,
    ) -> Result<(), MigrationError> {
        let role = channel.role();
        self.sockets.push(channel.socket()?);
        let (work, span) = (Arc::clone(work), tracing::Span::current());
        let body = move || {
            let _entered = span.enter();
            let guard = Guard { events, said: false };
            if bell.is_none() {
                Bulk::here();
            }
            if let Some(bell) = bell {
                match demand(&work, &mut channel, &bell) {
                    Ok(()) => guard.say(Event::Complete(Box::new(channel))),
                    Err(error) => guard.say(event(role, error)),
                }
            } else if let Err(error) = receive(&work, &mut channel)
                && !work.board.is_complete()
            {
                guard.say(event(role, error));
            } else {
                // Nothing more is needed from it: it has had its last marker, or all came by other ways and the source closes it.
                // It lives as long as its session.
                let mut guard = guard;
                guard.said = true;
                let _ = channel.receive("waiting for the end of the session");
            }
        };
        let thread = std::thread::Builder::new()
            .name(format!("post {role}"))
            .spawn(body)
            .map_err(|error| MigrationError::Options(format!("no thread for the {role} channel: {error}")))?;
        self.threads.push(thread);
        Ok(())
    }

    /// What happened, if something does within a tick.
    pub(super) fn wait(&self) -> Option<Event> {
        match self.events.recv_timeout(TICK) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            // The fault thread never ends without a word.
            Err(RecvTimeoutError::Disconnected) => Some(Event::Broken(MigrationError::Bug("post-copy"))),
        }
    }

    /// Cuts all channels off and waits for their threads.
    pub(super) fn end(self) {
        self.cut(0);
    }

    /// As [`Session::end`], after [`Event::Complete`]: the fault channel, which is the first one, stays.
    pub(super) fn finish(self) {
        self.cut(1);
    }

    fn cut(self, from: usize) {
        for socket in self.sockets.iter().skip(from) {
            let _ = socket.shutdown(Shutdown::Both);
        }
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a thread of post-copy panicked");
            }
        }
    }
}

/// The fault thread: demands out, pages and blocks in, until everything is here.
fn demand(work: &Work, channel: &mut Channel, bell: &UnixStream) -> Result<(), MigrationError> {
    let board = &work.board;
    channel.set_patience(SILENCE);
    for (disk, number) in board.asked() {
        channel.queue(&Message::Demand { disk, number })?;
    }
    let socket = channel.socket()?;
    let (mut scratch, mut nonce, mut heard, mut pinged) = (Vec::new(), 0, Instant::now(), Instant::now());
    channel.send(&Message::Ping { nonce })?;
    while !board.is_complete() {
        let left = PING.saturating_sub(pinged.elapsed());
        let mut answers = channel.has_input();
        if !answers {
            answers = wait(board, bell, &socket, left)?;
        }
        board.wanted(&mut scratch, |disk, number| Ok(channel.queue(&Message::Demand { disk, number })?))?;
        if pinged.elapsed() >= PING {
            (nonce, pinged) = (nonce + 1, Instant::now());
            channel.queue(&Message::Ping { nonce })?;
        }
        channel.flush()?;
        if answers {
            take(work, channel)?;
            heard = Instant::now();
        } else if heard.elapsed() > SILENCE {
            return Err(TransportError::Silent { doing: "waiting for pages", after: SILENCE }.into());
        }
    }
    finish(board, channel, nonce)?;
    channel.send(&Message::Complete(board.figures()))?;
    loop {
        match channel.next("waiting for the source to know that all is here").map_err(by_peer)? {
            Incoming::Message(Message::CompleteAck) => return Ok(()),
            // Answers that crossed: a page that was pushed meanwhile, and pings.
            Incoming::Message(Message::Pong { .. }) => {}
            other => store(work, channel, other)?,
        }
    }
}

/// Flushes disks, which takes its time, without a silence that the source would take for a lost link.
fn finish(board: &Board, channel: &mut Channel, mut nonce: u64) -> Result<(), MigrationError> {
    std::thread::scope(|scope| {
        let finishing = scope.spawn(|| board.finish());
        let mut pinged = Instant::now();
        while !finishing.is_finished() {
            if pinged.elapsed() >= PING {
                (nonce, pinged) = (nonce + 1, Instant::now());
                channel.send(&Message::Ping { nonce })?;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        finishing.join().unwrap_or(Err(MigrationError::Bug("the end of post-copy")))
    })
}

/// Sleeps until the guest or the source wants something; true if it is the source.
fn wait(board: &Board, bell: &UnixStream, socket: &TcpStream, left: Duration) -> Result<bool, MigrationError> {
    let mut fds: Vec<PollFd<'_>> = [socket.as_fd(), bell.as_fd()]
        .into_iter()
        .chain(board.ready())
        .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
        .collect();
    let timeout = PollTimeout::try_from(left.as_millis().max(1) as u32).unwrap_or(PollTimeout::ZERO);
    match poll(&mut fds, timeout) {
        Ok(_) => Ok(fds[0].any().unwrap_or(true)),
        Err(nix::errno::Errno::EINTR) => Ok(false),
        Err(errno) => Err(TransportError::Io { doing: "waiting for faults", source: errno.into() }.into()),
    }
}

fn take(work: &Work, channel: &mut Channel) -> Result<(), MigrationError> {
    match channel.next("waiting for pages").map_err(by_peer)? {
        Incoming::Message(Message::Pong { .. }) => Ok(()),
        other => store(work, channel, other),
    }
}

/// A channel that the source pushes to, until its last marker.
fn receive(work: &Work, channel: &mut Channel) -> Result<(), MigrationError> {
    channel.set_patience(FOREVER);
    let (mut counted, mut turns) = (Totals::default(), Turns::new());
    loop {
        match channel.next("waiting for pages and blocks").map_err(by_peer)? {
            Incoming::Message(Message::RoundEnd { totals, .. }) => {
                check_totals("pages or blocks", totals, counted)?;
                if work.board.is_complete() {
                    let _ = std::io::Write::write(&mut &work.bell, &[1]);
                }
                return Ok(());
            }
            Incoming::Pages { length } => {
                let mut sink = Sink { board: &work.board, totals: &mut counted };
                let bytes = channel.read_pages(length, work.layout.pages(), &mut sink)?;
                work.control.progress(bytes, 0);
                turns.pass();
            }
            other => {
                let zero = matches!(other, Incoming::Message(Message::ZeroBlocks { .. }));
                store(work, channel, other)?;
                if zero { counted.zero += 1 } else { counted.data += 1 }
            }
        }
    }
}

/// Stores what came on any channel.
fn store(work: &Work, channel: &mut Channel, incoming: Incoming) -> Result<(), MigrationError> {
    let board = &work.board;
    match incoming {
        Incoming::Pages { length } => {
            let mut sink = Sink { board, totals: &mut Totals::default() };
            let bytes = channel.read_pages(length, work.layout.pages(), &mut sink)?;
            work.control.progress(bytes, 0);
            Ok(())
        }
        Incoming::Block { length } => {
            let (head, data) = channel.read_block(length)?;
            let layout = work.layout.disks.get(usize::from(head.disk));
            let expected = layout.map_or(0, |disk| disk.block_bytes(head.block));
            if data.len() as u64 != expected || expected == 0 {
                let detail = format!("{} bytes for block {} of disk {}", data.len(), head.block, head.disk);
                return Err(WireError::Malformed { kind: "block frame", detail }.into());
            }
            work.control.progress(u64::from(length), 0);
            board.block(head.disk, head.block, data)
        }
        // One at a time: a block that is demanded has been read, and holes were sent before the switchover.
        Incoming::Message(Message::ZeroBlocks { disk, first, count: 1 }) if first < u64::MAX => {
            board.zero_blocks(disk, first..first + 1)
        }
        other => Err(WireError::Unexpected { found: other.name(), expected: "pages or blocks" }.into()),
    }
}

struct Sink<'a> {
    board: &'a Board,
    totals: &'a mut Totals,
}

impl PageSink for Sink<'_> {
    type Error = MigrationError;

    fn store(&mut self, first: u64, data: &[u8]) -> Result<(), MigrationError> {
        self.totals.data += data.len() as u64 / PAGE_BYTES;
        self.board.pages(first, data)
    }

    fn apply(&mut self, _: u64, _: &[u8]) -> Result<(), MigrationError> {
        // Nothing is held of what is missing.
        Err(WireError::Unexpected { found: "differences of pages", expected: "pages" }.into())
    }

    fn zero(&mut self, pages: Range<u64>) -> Result<(), MigrationError> {
        self.totals.zero += pages.end - pages.start;
        self.board.zero_pages(pages)
    }
}
