//! The connection to the source: the control channel, and a thread for each data channel.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::arrivals::{Arrivals, FOREVER};
use super::context::Context;
use super::disk::receive_blocks;
use super::door::OpenDoor;
use super::memory::receive_pages;
use super::supervise::{Awaited, Supervised};
use crate::error::MigrationError;
use crate::guest::MachineLayout;
use crate::page::Bitmap;
use crate::transport::channels::Channel;
use crate::transport::stop::Stop;
use crate::wire::handshake::Role;

/// The source says something on the control channel every second.
pub(super) const SILENCE: Duration = Duration::from_secs(15);

/// The connection to the source.
pub(super) struct Link {
    pub(super) control: Channel,
    arrivals: Arc<Arrivals>,
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
        let arrivals = Arrivals::new(control.socket()?, context.control.clone());
        Ok(Self {
            control,
            arrivals: Arc::new(arrivals),
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
        self.arrivals.expect(layout.pages());
        for mut channel in channels {
            let role = channel.role();
            channel.set_patience(FOREVER);
            self.sockets.push(channel.socket()?);
            let (guest, arrivals) = (Arc::clone(&context.guest), Arc::clone(&self.arrivals));
            let (layout, span, reuse) = (layout.clone(), tracing::Span::current(), context.options.reuse);
            let work = move || {
                let _entered = span.enter();
                arrivals.join();
                let result = match role {
                    Role::Disk => receive_blocks(&mut channel, &*guest, &layout, &arrivals, reuse),
                    _ => receive_pages(&mut channel, &*guest, &layout, &arrivals),
                };
                match result {
                    Ok(()) => {
                        arrivals.wait_over();
                        channel.close();
                    }
                    Err(error) => {
                        tracing::debug!(%role, error = %error.chain(), "data channel failed");
                        arrivals.fail(error);
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
        let fault = if ours { self.arrivals.take_fault() } else { None };
        fault.unwrap_or(error)
    }

    /// The source has stopped the guest: what is still on its way is waited for.
    pub(super) fn hurry(&self) {
        self.arrivals.hurry();
    }

    /// Waits until every data channel had its last marker.
    pub(super) fn wait_complete(&self) -> Result<(), MigrationError> {
        self.arrivals.wait_complete(self.threads.len())
    }

    /// Which pages, and which blocks of each disk, arrived.
    pub(super) fn arrived(&self) -> (Bitmap, Vec<Bitmap>) {
        self.arrivals.take()
    }

    /// Cuts all data channels off and waits for their threads.
    pub(super) fn end(&mut self) {
        (self.door, self.awaited, self.supervised) = (None, None, None);
        self.arrivals.end();
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

/// A phase that did not come to its end, and the link to be told about it, if there is one.
pub(super) struct Failed {
    pub(super) error: MigrationError,
    pub(super) link: Option<Link>,
}

impl Failed {
    pub(super) fn new(error: impl Into<MigrationError>, link: Option<Link>) -> Box<Self> {
        Box::new(Self { error: error.into(), link })
    }
}
