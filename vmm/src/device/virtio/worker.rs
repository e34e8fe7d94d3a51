//! The thread behind a device.
//!
//! A worker sleeps in epoll over its device's descriptors and a control descriptor. Whoever wants something of the device
//! (the registers, a pause, a save) hands it a closure and waits: so all state of the device belongs to one thread, needs no
//! lock, and is between two requests whenever a closure runs.

use std::io;
use std::sync::mpsc;
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::VirtQueue;
use crate::device::DeviceError;
use crate::sandbox::{self, Role};
use crate::slice;

/// Enough for the deepest call with room to spare; only touched pages cost memory.
const STACK_BYTES: usize = 256 * 1024;
const CONTROL: u64 = u64::MAX;

/// What runs in a worker.
pub trait Backend: Send + 'static {
    /// Where its descriptors are registered, with tokens of its own choice but `u64::MAX`.
    fn epoll(&self) -> &Epoll;

    /// A descriptor is ready.
    fn ready(&mut self, token: u64);

    /// The driver is ready: serve these queues, unless paused.
    fn activate(&mut self, features: u64, queues: Vec<Option<VirtQueue>>);

    /// Finish what is in flight; then touch nothing until `run`.
    fn pause(&mut self);

    /// Go on, beginning with all that waits.
    fn run(&mut self);

    /// Finish what is in flight of this queue, and forget it.
    fn stop_queue(&mut self, index: usize);

    /// The driver has reset the device; all queues are forgotten.
    fn reset(&mut self) {}

    /// (next available, next used) of the live queues.
    fn progress(&self) -> Vec<Option<(u16, u16)>>;
}

type Call<B> = Box<dyn FnOnce(&mut B) + Send>;

/// A running worker. Dropping it ends the thread.
pub struct Worker<B: Backend> {
    name: String,
    calls: Option<mpsc::Sender<Call<B>>>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl<B: Backend> Worker<B> {
    /// Starts the thread; `name` is the device's, for messages.
    ///
    /// # Errors
    ///
    /// If a descriptor or the thread cannot be made.
    pub fn spawn(name: &str, backend: B) -> Result<Self, DeviceError> {
        let failed = |action| move |source: io::Error| DeviceError::Setup { device: name.to_owned(), action, source };
        let wake = EventFd::new(EFD_NONBLOCK).map_err(failed("make an eventfd"))?;
        let control = wake.try_clone().map_err(failed("duplicate an eventfd"))?;
        let event = EpollEvent::new(EventSet::IN, CONTROL);
        backend
            .epoll()
            .ctl(ControlOperation::Add, std::os::fd::AsRawFd::as_raw_fd(&control), event)
            .map_err(failed("watch an eventfd"))?;
        let (calls, receiver) = mpsc::channel();
        // The kernel shows 15 characters.
        let short = name.rsplit('/').next().unwrap_or(name).to_owned();
        let thread = std::thread::Builder::new()
            .name(short)
            .stack_size(STACK_BYTES)
            .spawn(move || serve(backend, &control, &receiver))
            .map_err(failed("start its thread"))?;
        Ok(Self { name: name.to_owned(), calls: Some(calls), wake, thread: Some(thread) })
    }

    /// Runs `action` in the worker and waits for its result.
    ///
    /// # Errors
    ///
    /// [`DeviceError::WorkerGone`] if the thread has ended.
    pub fn call<R: Send + 'static>(&self, action: impl FnOnce(&mut B) -> R + Send + 'static) -> Result<R, DeviceError> {
        let (answer, result) = mpsc::sync_channel(1);
        self.post(move |backend| {
            // The caller waits; should it be gone, nobody needs the answer.
            let _unwanted = answer.send(action(backend));
        })?;
        result.recv().map_err(|_| self.gone())
    }

    /// Runs `action` in the worker, and does not wait.
    ///
    /// # Errors
    ///
    /// [`DeviceError::WorkerGone`] if the thread has ended.
    pub fn post(&self, action: impl FnOnce(&mut B) + Send + 'static) -> Result<(), DeviceError> {
        let calls = self.calls.as_ref().ok_or_else(|| self.gone())?;
        calls.send(Box::new(action)).map_err(|_| self.gone())?;
        self.wake.write(1).map_err(|_| self.gone())
    }

    fn gone(&self) -> DeviceError {
        DeviceError::WorkerGone { device: self.name.clone() }
    }
}

impl<B: Backend> Drop for Worker<B> {
    fn drop(&mut self) {
        // A closed channel ends the thread.
        self.calls = None;
        if self.wake.write(1).is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(device = self.name, "the worker had panicked");
        }
    }
}

fn serve<B: Backend>(mut backend: B, control: &EventFd, calls: &mpsc::Receiver<Call<B>>) {
    slice::ask_for(slice::DEVICE);
    if let Err(error) = sandbox::confine(Role::Device) {
        let error = &error as &dyn std::error::Error;
        tracing::error!(error, "a device's thread ends: it must not serve a guest like this");
        return;
    }
    let mut events = [EpollEvent::default(); 8];
    loop {
        let count = match backend.epoll().wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(%error, "a device's epoll failed");
                return;
            }
        };
        for event in &events[..count] {
            if event.data() != CONTROL {
                backend.ready(event.data());
                continue;
            }
            // Cleared before the channel is read, so that a call that arrives meanwhile wakes again.
            let _cleared = control.read();
            loop {
                match calls.try_recv() {
                    Ok(call) => call(&mut backend),
                    Err(mpsc::TryRecvError::Empty) => break,
                    Err(mpsc::TryRecvError::Disconnected) => {
                        backend.pause();
                        return;
                    }
                }
            }
        }
    }
}
