//! What every virtio device is made of: registers, an interrupt line, and a worker.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::guest::DeviceSlot;
use vmm_sys_util::eventfd::EventFd;

use super::mmio::MmioTransport;
use super::registers::Link;
use super::{Backend, Interrupt, Registers, TransportStateV1, VirtQueue, Worker};
use crate::device::{DeviceError, StateError};
use crate::memory::GuestRam;

/// What the driver is told of a device.
#[derive(Clone, Debug)]
pub struct Model {
    /// Name of the saved state: `virtio-block/disk0`.
    pub name: String,
    /// Virtio device type (virtio 1.2, section 5).
    pub device_id: u32,
    /// Features offered.
    pub features: u64,
    /// Largest size of each queue, powers of two.
    pub queue_sizes: Vec<u16>,
    /// Version of the saved state.
    pub state_version: u16,
}

/// A device: everything but what is special to its kind.
pub struct Unit<B: Backend> {
    slot: DeviceSlot,
    registers: Arc<Mutex<Registers>>,
    interrupt: Arc<Interrupt>,
    worker: Arc<Worker<B>>,
    paused: AtomicBool,
}

/// The registers' way to the worker.
struct WorkerLink<B: Backend>(Arc<Worker<B>>);

impl<B: Backend> Link for WorkerLink<B> {
    fn activate(&self, features: u64, queues: Vec<Option<VirtQueue>>) -> bool {
        self.0.call(move |backend| backend.activate(features, queues)).is_ok()
    }

    fn stop_queue(&self, index: usize) -> bool {
        self.0.call(move |backend| backend.stop_queue(index)).is_ok()
    }

    fn reset(&self) -> bool {
        self.0.call(|backend| (0..backend.progress().len()).for_each(|index| backend.stop_queue(index))).is_ok()
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
        backend: B,
        state: Option<&TransportStateV1>,
    ) -> Result<Self, DeviceError> {
        let slot = DeviceSlot { name: model.name.clone(), version: model.state_version };
        let worker = Arc::new(Worker::spawn(&model.name, backend)?);
        let link = Box::new(WorkerLink(Arc::clone(&worker)));
        let mut registers = Registers::new(model, config, ram, Arc::clone(&interrupt), notify, link);
        if let Some(state) = state {
            worker.call(B::pause)?;
            registers.restore(state).map_err(|what| StateError::Unfit { device: slot.name.clone(), what })?;
        }
        let registers = Arc::new(Mutex::new(registers));
        Ok(Self { slot, registers, interrupt, worker, paused: AtomicBool::new(state.is_some()) })
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.worker.call(B::pause)
    }

    /// See [`crate::device::Device::pause`].
    pub fn pause(&self) -> Result<(), DeviceError> {
        self.worker.call(B::pause)?;
        self.paused.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// See [`crate::device::Device::resume`].
    pub fn resume(&self) -> Result<(), DeviceError> {
        self.paused.store(false, Ordering::SeqCst);
        self.interrupt.reassert();
        self.worker.call(B::run)
    }

    /// State of the registers and queues.
    pub fn save(&self) -> Result<TransportStateV1, DeviceError> {
        if !self.paused.load(Ordering::SeqCst) {
            return Err(DeviceError::NotPaused { device: self.slot.name.clone() });
        }
        let progress = self.worker.call(|backend| backend.progress())?;
        Ok(self.registers().save(&progress))
    }
}
