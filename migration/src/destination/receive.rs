//! Pre-copy at the destination: the control channel here, each data channel in a thread of its own.

use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::disk::receive_blocks;
use super::listen::OpenDoor;
use super::memory::receive_pages;
use super::postcopy::{Awaited, Supervised};
use super::resume::Switchover;
use super::{Context, Failed, verify};
use crate::control::Control;
use crate::error::MigrationError;
use crate::guest::MachineLayout;
use crate::page::Bitmap;
use crate::transport::TransportError;
use crate::transport::channels::{Channel, Incoming};
use crate::transport::stream::Stop;
use crate::transport::tcp::TICK;
use crate::urgency::Bulk;
use crate::wire::WireError;
use crate::wire::handshake::Role;
use crate::wire::message::Message;

/// The source says something on the control channel every second.
pub(super) const SILENCE: Duration = Duration::from_secs(15);
/// A data channel may rest for as long as the control channel lives.
pub(super) const FOREVER: Duration = Duration::from_secs(1 << 32);
/// The last data may need so long after the state has arrived.
const FINAL_TIMEOUT: Duration = Duration::from_secs(120);
/// If data channels break, the source may be about to say why on the control channel.
const LAST_WORDS: Duration = Duration::from_millis(700);

/// What the threads of one migration share.
pub(super) struct Shared {
    state: Mutex<Arrivals>,
    changed: Condvar,
    control_socket: TcpStream,
    pub(super) control: Control,
}

#[derive(Default)]
struct Arrivals {
    /// Data channels that had their last marker.
    complete: usize,
    /// The first thing that went wrong on a data channel.
    fault: Option<MigrationError>,
    /// Nobody waits for anything any more.
    over: bool,
    /// Pages that came with data.
    pages: Bitmap,
    /// Blocks that came with data or were read as zeroes at the source, by disk.
    blocks: Vec<Bitmap>,
    /// The threads of the data channels.
    bulk: Vec<Bulk>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, Arrivals> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A memory channel is complete; these pages came over it.
    pub(super) fn memory_complete(&self, pages: &Bitmap) {
        let mut state = self.state();
        state.pages.union(pages);
        state.complete += 1;
        self.changed.notify_all();
    }

    /// The disk channel is complete.
    pub(super) fn disk_complete(&self, blocks: Vec<Bitmap>) {
        let mut state = self.state();
        state.blocks = blocks;
        state.complete += 1;
        self.changed.notify_all();
    }

    /// Waits for the end of the migration: a thread that ended now would take its time from the switchover.
    pub(super) fn wait_over(&self) {
        let wait = self.changed.wait_while(self.state(), |state| !state.over);
        drop(wait.unwrap_or_else(PoisonError::into_inner));
    }

    /// A data channel failed. Makes the control thread, which may be waiting for the source, look.
    fn fail(&self, error: MigrationError) {
        let link = matches!(&error, MigrationError::Transport(error) if error.is_link());
        let mut state = self.state();
        state.fault.get_or_insert(error);
        self.changed.notify_all();
        if link {
            let wait = self.changed.wait_timeout_while(state, LAST_WORDS, |state| !state.over);
            drop(wait.unwrap_or_else(PoisonError::into_inner));
        } else {
            drop(state);
        }
        let _ = self.control_socket.shutdown(Shutdown::Read);
    }
}

/// The connection to the source.
pub(super) struct Link {
    pub(super) control: Channel,
    shared: Arc<Shared>,
    sockets: Vec<TcpStream>,
    threads: Vec<(Role, JoinHandle<()>)>,
    /// Where the source can come back; closed unless post-copy is possible.
    pub(super) door: Option<OpenDoor>,
    /// What the source has announced for post-copy.
    pub(super) awaited: Option<Awaited>,
    /// Post-copy has begun.
    pub(super) supervised: Option<Supervised>,
    /// Memory channels.
    pub(super) streams: u16,
}

impl Link {
    pub(super) fn new(mut control: Channel, context: &Context) -> Result<Self, MigrationError> {
        control.set_patience(SILENCE);
        let shared = Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            control_socket: control.socket()?,
            control: context.control.clone(),
        };
        Ok(Self {
            control,
            shared: Arc::new(shared),
            sockets: Vec::new(),
            threads: Vec::new(),
            door: None,
            awaited: None,
            supervised: None,
            streams: 0,
        })
    }

    /// Starts a thread for each data channel.
    pub(super) fn start(
        &mut self,
        context: &Context,
        layout: &MachineLayout,
        channels: Vec<Channel>,
    ) -> Result<(), MigrationError> {
        self.shared.state().pages = Bitmap::new(layout.pages());
        for mut channel in channels {
            let role = channel.role();
            channel.set_patience(FOREVER);
            self.sockets.push(channel.socket()?);
            let (guest, shared) = (Arc::clone(&context.guest), Arc::clone(&self.shared));
            let (layout, span, reuse) = (layout.clone(), tracing::Span::current(), context.options.reuse);
            let work = move || {
                let _entered = span.enter();
                shared.state().bulk.push(Bulk::here());
                let result = match role {
                    Role::Disk => receive_blocks(&mut channel, &*guest, &layout, &shared, reuse),
                    _ => receive_pages(&mut channel, &*guest, &layout, &shared),
                };
                match result {
                    Ok(()) => {
                        shared.wait_over();
                        channel.close();
                    }
                    Err(error) => {
                        tracing::debug!(%role, error = %error.chain(), "data channel failed");
                        shared.fail(error);
                    }
                }
            };
            let thread = std::thread::Builder::new()
                .name(format!("receive {role}"))
                .spawn(work)
                .map_err(|error| MigrationError::Options(format!("no thread for the {role} channel: {error}")))?;
            self.threads.push((role, thread));
        }
        Ok(())
    }

    /// What went wrong on a data channel, if something did; else `error`.
    pub(super) fn cause(&self, error: impl Into<MigrationError>) -> MigrationError {
        let error = error.into();
        let ours = matches!(&error, MigrationError::Transport(error) if error.is_link());
        let fault = if ours { self.shared.state().fault.take() } else { None };
        fault.unwrap_or(error)
    }

    /// The source has stopped the guest: what is still on its way is waited for.
    fn hurry(&self) {
        for thread in &self.shared.state().bulk {
            thread.hurry();
        }
    }

    /// Waits until every data channel had its last marker.
    pub(super) fn wait_complete(&self) -> Result<(), MigrationError> {
        let start = Instant::now();
        let mut state = self.shared.state();
        while state.complete < self.threads.len() {
            if let Some(fault) = state.fault.take() {
                return Err(fault);
            }
            if self.shared.control.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            if start.elapsed() > FINAL_TIMEOUT {
                let doing = "waiting for the last pages and blocks";
                return Err(TransportError::Silent { doing, after: FINAL_TIMEOUT }.into());
            }
            let wait = self.shared.changed.wait_timeout(state, TICK);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Which pages, and which blocks of each disk, arrived.
    pub(super) fn arrived(&self) -> (Bitmap, Vec<Bitmap>) {
        let mut state = self.shared.state();
        (std::mem::take(&mut state.pages), std::mem::take(&mut state.blocks))
    }

    /// Cuts all data channels off and waits for their threads.
    pub(super) fn end(&mut self) {
        (self.door, self.awaited, self.supervised) = (None, None, None);
        self.shared.state().over = true;
        self.shared.changed.notify_all();
        for socket in self.sockets.drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
        for (role, thread) in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!(%role, "the thread of a data channel panicked");
            }
        }
    }

    /// Says why this end gives up.
    pub(super) fn tell(&mut self, reason: &str) {
        self.control.set_stop(Stop::default());
        self.control.abort(reason);
    }
}

/// Data can arrive.
pub(super) struct Precopy {
    link: Link,
    layout: MachineLayout,
}

impl Precopy {
    pub(super) fn new(link: Link, layout: MachineLayout) -> Self {
        Self { link, layout }
    }

    /// Answers the source until the state arrives.
    pub(super) fn run(mut self, context: &mut Context) -> Result<Switchover, Box<Failed>> {
        loop {
            match self.link.control.next("waiting for the source") {
                Ok(Incoming::Message(Message::State { payloads })) => {
                    self.link.hurry();
                    return Ok(Switchover::new(self.link, self.layout, payloads));
                }
                Ok(Incoming::Message(message)) => {
                    if let Err(error) = self.answer(context, &message) {
                        return Err(Failed::new(error, Some(self.link)));
                    }
                }
                Ok(other) => {
                    let error = WireError::Unexpected { found: other.name(), expected: "State" };
                    return Err(Failed::new(error, Some(self.link)));
                }
                Err(error) => {
                    let error = if context.control.is_cancelled() { MigrationError::Cancelled } else { by_peer(error) };
                    let error = self.link.cause(error);
                    return Err(Failed::new(error, Some(self.link)));
                }
            }
        }
    }

    fn answer(&mut self, context: &Context, message: &Message) -> Result<(), MigrationError> {
        match message {
            Message::Ping { nonce } => {
                let sent = self.link.control.send(&Message::Pong { nonce: *nonce });
                sent.map_err(|error| self.link.cause(error))
            }
            Message::CompareFull => {
                self.link.wait_complete()?;
                let difference = verify::compare_images(context, &mut self.link, &self.layout)?;
                self.link.control.send(&Message::Compared { difference: difference.clone() })?;
                match difference {
                    Some(difference) => Err(MigrationError::Different { difference }),
                    None => Ok(()),
                }
            }
            Message::PostcopyPrepare if self.link.door.is_some() && self.link.awaited.is_none() => {
                self.link.awaited = Some(Awaited::new(&self.layout));
                Ok(())
            }
            Message::Missing { .. } | Message::MissingEnd { .. } => self.missing(context, message),
            other => Err(WireError::Unexpected { found: other.name(), expected: "State" }.into()),
        }
    }

    fn missing(&mut self, context: &Context, message: &Message) -> Result<(), MigrationError> {
        let (Some(awaited), Some(door)) = (&mut self.link.awaited, &self.link.door) else {
            return Err(WireError::Unexpected { found: message.name(), expected: "State" }.into());
        };
        if awaited.take(context, message)? && !awaited.is_attached() {
            awaited.attach(context, door, self.link.streams)?;
            self.link.control.send(&Message::PostcopyReady)?;
        }
        Ok(())
    }
}

/// Turns the source's own words into an error of their own kind.
pub(super) fn by_peer(error: TransportError) -> MigrationError {
    match error {
        TransportError::Aborted { reason } => MigrationError::Peer { peer: "source", reason },
        other => other.into(),
    }
}
