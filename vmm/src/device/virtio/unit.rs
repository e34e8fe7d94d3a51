//! What every virtio device is made of: registers, an interrupt line, and a worker.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::guest::DeviceSlot;
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::Interrupt;
use super::mmio::MmioTransport;
use super::model::Model;
use super::queue::VirtQueue;
use super::registers::{Link, Registers};
use super::state::TransportStateV1;
use super::worker::{Backend, Worker};
use crate::device::{DeviceError, StateError};
use crate::memory::GuestRam;

/// (next available, next used) of each live queue of a paused worker; `None` while that is not known.
///
/// On a busy host each call into a worker may wait milliseconds for a processor. A switchover must not wait for the same
/// answer twice: who pauses a worker keeps what it says of its queues. It is set and cleared in the worker, so that it is
/// always of the latest call.
type Progress = Arc<Mutex<Option<Vec<Option<(u16, u16)>>>>>;

/// A device: everything but what is special to its kind.
pub struct Unit<B: Backend> {
    slot: DeviceSlot,
    registers: Arc<Mutex<Registers>>,
    interrupt: Arc<Interrupt>,
    worker: Arc<Worker<B>>,
    progress: Progress,
    paused: AtomicBool,
}

/// The registers' way to the worker.
struct WorkerLink<B: Backend> {
    worker: Arc<Worker<B>>,
    progress: Progress,
}

impl<B: Backend> Link for WorkerLink<B> {
    fn activate(&self, features: u64, queues: Vec<Option<VirtQueue>>, wait: bool) -> bool {
        let progress = Arc::clone(&self.progress);
        let activate = move |backend: &mut B| {
            *lock(&progress) = None;
            backend.activate(features, queues);
        };
        if wait { self.worker.call(activate).is_ok() } else { self.worker.post(activate).is_ok() }
    }

    fn stop_queue(&self, index: usize) -> bool {
        let progress = Arc::clone(&self.progress);
        let stop = move |backend: &mut B| {
            *lock(&progress) = None;
            backend.stop_queue(index);
        };
        self.worker.call(stop).is_ok()
    }

    fn reset(&self) -> bool {
        let progress = Arc::clone(&self.progress);
        let reset = move |backend: &mut B| {
            *lock(&progress) = None;
            (0..backend.progress().len()).for_each(|index| backend.stop_queue(index));
            backend.reset();
        };
        self.worker.call(reset).is_ok()
    }
}

impl<B: Backend> Unit<B> {
    /// A device as after a reset; paused if a state is to be restored.
    ///
    /// # Errors
    ///
    /// If the worker cannot be made, or the saved state does not fit.
    pub fn new(
        model: Model,
        config: Arc<Mutex<Vec<u8>>>,
        ram: GuestRam,
        interrupt: Arc<Interrupt>,
        notify: Vec<EventFd>,
        mut backend: B,
        state: Option<&TransportStateV1>,
    ) -> Result<Self, DeviceError> {
        let slot = DeviceSlot { name: model.name.clone(), version: model.state_version };
        if state.is_some() {
            backend.pause();
        }
        let worker = Arc::new(Worker::spawn(&model.name, backend)?);
        let progress = Progress::default();
        let link = Box::new(WorkerLink { worker: Arc::clone(&worker), progress: Arc::clone(&progress) });
        let mut registers = Registers::new(model, config, ram, Arc::clone(&interrupt), notify, link);
        if let Some(state) = state {
            registers.restore(state).map_err(|what| StateError::Unfit { device: slot.name.clone(), what })?;
        }
        let registers = Arc::new(Mutex::new(registers));
        Ok(Self { slot, registers, interrupt, worker, progress, paused: AtomicBool::new(state.is_some()) })
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }

    /// Name and version of the saved state.
    pub fn slot(&self) -> &DeviceSlot {
        &self.slot
    }

    /// The register window.
    pub fn transport(&self) -> MmioTransport {
        MmioTransport::new(Arc::clone(&self.registers))
    }

    /// The thread.
    pub fn worker(&self) -> &Worker<B> {
        &self.worker
    }

    /// See [`crate::device::Device::settle`].
    pub fn settle(&self) -> Result<(), DeviceError> {
        let progress = Arc::clone(&self.progress);
        self.worker.call(move |backend| {
            backend.pause();
            *lock(&progress) = Some(backend.progress());
        })
    }

    /// See [`crate::device::Device::pause`].
    pub fn pause(&self) -> Result<(), DeviceError> {
        // A worker that is paused already, and was not told anything since, need not be woken.
        if lock(&self.progress).is_none() {
            self.settle()?;
        }
        self.paused.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// See [`crate::device::Device::resume`]. The worker begins when it is scheduled; vCPUs need not wait for that.
    pub fn resume(&self) -> Result<(), DeviceError> {
        self.paused.store(false, Ordering::SeqCst);
        *lock(&self.progress) = None;
        self.interrupt.reassert();
        self.worker.post(B::run)
    }

    /// Changes the configuration space, and tells the driver: at once, or when the device goes on.
    pub fn change_config(&self, change: impl FnOnce(&mut [u8])) {
        // Whoever reads the space or its generation holds the registers: he sees both as before, or both changed.
        let registers = self.registers();
        registers.change_config(change);
        self.interrupt.note_config_change();
        if !self.paused.load(Ordering::SeqCst) {
            self.interrupt.reassert();
        }
    }

    /// State of the registers and queues.
    pub fn save(&self) -> Result<TransportStateV1, DeviceError> {
        if !self.paused.load(Ordering::SeqCst) {
            return Err(DeviceError::NotPaused { device: self.slot.name.clone() });
        }
        if lock(&self.progress).is_none() {
            self.settle()?;
        }
        let progress = lock(&self.progress).clone().unwrap_or_default();
        Ok(self.registers().save(&progress))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
