//! The balloon as the machine sees it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use migration::guest::{DeviceSlot, StatePayload};
use migration::page::SharedBitmap;

use super::state::{BalloonStateV1, VERSION};
use super::worker::{BalloonCounters, BalloonWorker, ConfigSpace, Parts};
use super::{PAGE_BYTES, PAGES_PER_MIB, QUEUE_SIZE, QUEUES, feature, field};
use crate::api::BalloonInfo;
use crate::config::BalloonConfig;
use crate::device::virtio::mmio::MmioTransport;
use crate::device::virtio::{Interrupt, Model, Unit, Wiring, feature as common};
use crate::device::{Device, DeviceError, StateError, state};
use crate::memory::Memory;

/// Virtio device type (virtio 1.2, section 5).
const DEVICE_ID: u32 = 5;

/// A balloon. It also implements [`crate::device::Device`].
pub struct Balloon {
    unit: Unit<BalloonWorker>,
    config: ConfigSpace,
    counters: Arc<BalloonCounters>,
    hint_id: Arc<AtomicU32>,
}

impl Balloon {
    /// A new balloon for all of `memory`.
    ///
    /// # Errors
    ///
    /// If its thread or descriptors cannot be made.
    pub fn new(config: &BalloonConfig, memory: &Memory, wiring: Wiring) -> Result<Self, DeviceError> {
        Self::build(config, memory, wiring, None)
    }

    /// A balloon as it was saved, paused. Its target is that which the guest was told last.
    ///
    /// # Errors
    ///
    /// As [`Balloon::new`], or if the state does not fit.
    pub fn restore(
        config: &BalloonConfig,
        memory: &Memory,
        wiring: Wiring,
        state: &StatePayload,
    ) -> Result<Self, DeviceError> {
        let slot = slot();
        let saved: BalloonStateV1 = state::decode(&slot, state)?;
        if u64::from(saved.target) > memory.pages() {
            let (target, pages) = (saved.target, memory.pages());
            let what = format!("the guest was asked for {target} pages, the machine has {pages}");
            return Err(StateError::Unfit { device: slot.name, what }.into());
        }
        Self::build(config, memory, wiring, Some(&saved))
    }

    fn build(
        config: &BalloonConfig,
        memory: &Memory,
        wiring: Wiring,
        saved: Option<&BalloonStateV1>,
    ) -> Result<Self, DeviceError> {
        let DeviceSlot { name, version } = slot();
        let notify = wiring.notify.len();
        let failed = |action| {
            let device = name.clone();
            move |source| DeviceError::Setup { device, action, source }
        };
        let kicks: Result<Vec<_>, _> = wiring.notify.iter().map(|notify| notify.try_clone()).collect();
        let kicks = kicks.map_err(failed("duplicate an eventfd"))?;
        let kicks =
            kicks.try_into().map_err(|_| DeviceError::Wiring { device: name.clone(), queues: QUEUES, notify })?;
        let space = ConfigSpace::default();
        let target = saved.map_or((config.target_mib * PAGES_PER_MIB) as u32, |saved| saved.target);
        space.set(field::TARGET, target);
        if let Some(saved) = saved {
            space.set(field::ACTUAL, saved.actual);
            space.set(field::POISON, saved.poison);
            // A migration that was using hints has ended.
            space.set(field::COMMAND, super::hint::DONE);
        }
        let interrupt = Arc::new(Interrupt::new(wiring.interrupt));
        let counters = Arc::new(BalloonCounters::default());
        let hint_id = Arc::new(AtomicU32::new(saved.map_or(0, |saved| saved.hint_id)));
        let parts = Parts {
            memory: memory.clone(),
            interrupt: Arc::clone(&interrupt),
            config: space.clone(),
            counters: Arc::clone(&counters),
            hint_id: Arc::clone(&hint_id),
        };
        let backend = BalloonWorker::new(kicks, parts).map_err(failed("set up epoll"))?;
        let model = Model {
            name,
            device_id: DEVICE_ID,
            features: features(config),
            queue_sizes: vec![QUEUE_SIZE; QUEUES],
            state_version: version,
            writable: &[field::ACTUAL..field::ACTUAL + 4, field::POISON..field::POISON + 4],
        };
        let transport = saved.map(|saved| &saved.transport);
        let shared = Arc::clone(&space.0);
        let unit = Unit::new(model, shared, wiring.ram, Arc::clone(&interrupt), wiring.notify, backend, transport)?;
        if saved.is_some() {
            // It was perhaps changed after the guest had been stopped; one look too many does no harm.
            interrupt.config_changed();
        }
        Ok(Self { unit, config: space, counters, hint_id })
    }

    /// The registers, to be put on the bus.
    pub fn transport(&self) -> MmioTransport {
        self.unit.transport()
    }

    /// Asks the guest to give so many MiB back; it does so as it can.
    ///
    /// # Errors
    ///
    /// [`DeviceError::WorkerGone`].
    pub fn set_target(&self, mib: u64) -> Result<(), DeviceError> {
        let pages = u32::try_from(mib * PAGES_PER_MIB).unwrap_or(u32::MAX);
        self.unit.worker().call(move |worker| worker.set_target(pages))
    }

    /// What was asked for, what was given, and what the guest said of its memory when it was asked the last time.
    ///
    /// # Errors
    ///
    /// [`DeviceError::WorkerGone`].
    pub fn info(&self) -> Result<BalloonInfo, DeviceError> {
        let statistics = self.unit.worker().call(BalloonWorker::statistics)?;
        let bytes = |field| u64::from(self.config.get(field)) * PAGE_BYTES;
        Ok(BalloonInfo {
            target_bytes: bytes(field::TARGET),
            actual_bytes: bytes(field::ACTUAL),
            inflated_bytes: self.counters.inflated.load(Ordering::Relaxed),
            reported_bytes: self.counters.reported.load(Ordering::Relaxed),
            hinted_bytes: self.counters.hinted.load(Ordering::Relaxed),
            statistics,
        })
    }

    /// Asks the guest for the pages that are free from now on, whose numbers are set in `free`. False if it cannot tell.
    ///
    /// # Errors
    ///
    /// [`DeviceError::WorkerGone`].
    pub fn start_hints(&self, free: Arc<SharedBitmap>) -> Result<bool, DeviceError> {
        self.unit.worker().call(move |worker| worker.start_hints(free))
    }

    /// Whether the guest has named all free pages.
    ///
    /// # Errors
    ///
    /// [`DeviceError::WorkerGone`].
    pub fn hints_are_over(&self) -> Result<bool, DeviceError> {
        self.unit.worker().call(|worker| worker.hints_are_over())
    }

    /// When it returns, no page is named any more. `done`: the guest may use them for something else.
    ///
    /// # Errors
    ///
    /// [`DeviceError::WorkerGone`].
    pub fn stop_hints(&self, done: bool) -> Result<(), DeviceError> {
        self.unit.worker().call(move |worker| worker.stop_hints(done))
    }
}

fn features(config: &BalloonConfig) -> u64 {
    let mut features = common::COMMON | feature::STATISTICS | feature::HINTS | feature::POISON;
    if config.deflate_on_oom {
        features |= feature::DEFLATE_ON_OOM;
    }
    if config.free_page_reporting {
        features |= feature::REPORTS;
    }
    features
}

impl Device for Balloon {
    fn slot(&self) -> DeviceSlot {
        self.unit.slot().clone()
    }

    fn pause(&self) -> Result<(), DeviceError> {
        self.unit.pause()
    }

    fn resume(&self) -> Result<(), DeviceError> {
        self.unit.resume()
    }

    fn save(&self) -> Result<StatePayload, DeviceError> {
        let transport = self.unit.save()?;
        let hint_id = self.hint_id.load(Ordering::SeqCst);
        let get = |field| self.config.get(field);
        let (target, actual, poison) = (get(field::TARGET), get(field::ACTUAL), get(field::POISON));
        Ok(state::encode(self.slot(), &BalloonStateV1 { transport, target, actual, poison, hint_id })?)
    }
}

/// The slot of the device, for a layout that is told before it is built.
pub fn slot() -> DeviceSlot {
    DeviceSlot { name: "virtio-balloon".to_owned(), version: VERSION }
}
