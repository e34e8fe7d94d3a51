//! What the threads of the data channels tell the one of the control channel.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::control::Control;
use crate::error::MigrationError;
use crate::page::Bitmap;
use crate::transport::TransportError;
use crate::transport::tcp::TICK;
use crate::urgency::{Bulk, Turns};
use crate::wire::message::Totals;

/// A data channel may rest for as long as the control channel lives.
pub(super) const FOREVER: Duration = Duration::from_secs(1 << 32);
/// The last data may need so long after the state has arrived.
const FINAL_TIMEOUT: Duration = Duration::from_secs(120);
/// If data channels break, the source may be about to say why on the control channel.
const LAST_WORDS: Duration = Duration::from_millis(700);

/// What has arrived, and how the channels fare.
pub(super) struct Arrivals {
    state: Mutex<State>,
    changed: Condvar,
    /// The guest waits for what is on its way.
    urgent: AtomicBool,
    control_socket: TcpStream,
    pub(super) control: Control,
}

#[derive(Default)]
struct State {
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

impl Arrivals {
    /// Of channels whose control channel is this one.
    pub(super) fn new(control_socket: TcpStream, control: Control) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            urgent: AtomicBool::new(false),
            control_socket,
            control,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
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
    pub(super) fn fail(&self, error: MigrationError) {
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

    /// So many pages can arrive.
    pub(super) fn expect(&self, pages: u64) {
        self.state().pages = Bitmap::new(pages);
    }

    /// This thread carries a data channel from here on.
    pub(super) fn join(&self) {
        self.state().bulk.push(Bulk::here());
    }

    /// The source has stopped the guest: what is still on its way is waited for.
    pub(super) fn hurry(&self) {
        self.urgent.store(true, Ordering::Relaxed);
        for thread in &self.state().bulk {
            thread.hurry();
        }
    }

    /// Lets others have the processor from time to time, as long as the guest does not wait.
    pub(super) fn pass(&self, turns: &mut Turns) {
        if !self.urgent.load(Ordering::Relaxed) {
            turns.pass();
        }
    }

    /// What went wrong on a data channel, if something did.
    pub(super) fn take_fault(&self) -> Option<MigrationError> {
        self.state().fault.take()
    }

    /// Waits until so many data channels had their last marker.
    pub(super) fn wait_complete(&self, channels: usize) -> Result<(), MigrationError> {
        let start = Instant::now();
        let mut state = self.state();
        while state.complete < channels {
            if let Some(fault) = state.fault.take() {
                return Err(fault);
            }
            if self.control.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            if start.elapsed() > FINAL_TIMEOUT {
                let doing = "waiting for the last pages and blocks";
                return Err(TransportError::Silent { doing, after: FINAL_TIMEOUT }.into());
            }
            let wait = self.changed.wait_timeout(state, TICK);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Which pages, and which blocks of each disk, arrived.
    pub(super) fn take(&self) -> (Bitmap, Vec<Bitmap>) {
        let mut state = self.state();
        (std::mem::take(&mut state.pages), std::mem::take(&mut state.blocks))
    }

    /// Nobody waits for anything any more.
    pub(super) fn end(&self) {
        self.state().over = true;
        self.changed.notify_all();
    }
}

/// Whether all arrived that was sent.
pub(super) fn check_totals(what: &str, sent: Totals, arrived: Totals) -> Result<(), MigrationError> {
    if sent == arrived {
        return Ok(());
    }
    let difference = format!(
        "the source says that it sent {} {what} and {} zero ones, {} and {} arrived",
        sent.data, sent.zero, arrived.data, arrived.zero
    );
    Err(MigrationError::Different { difference })
}
