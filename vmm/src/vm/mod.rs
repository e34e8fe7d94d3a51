//! A machine's life.
//!
//! ```text
//!            boot                       pause                fence
//!   (none) ────────> Paused  <────────────────────> Running        Paused <───────> Fenced
//!            incoming          resume                 │                   unfence
//!   (none) ────────> Incoming ──restore_state──> Paused   the guest turns itself off, or cannot go on: Stopped
//! ```
//!
//! # Locks
//!
//! `transition` is held by whoever pauses, resumes, saves, restores or fences, for as long as that takes: transitions happen
//! one after the other. `state` and `devices` are held for single reads and writes, never while anything else is waited
//! for, so that asking what a machine does never waits for a transition. Order: `transition`, then `devices`, then `state`;
//! vCPU and device locks are inside of all three.

mod digest;
mod disks;
mod error;
mod state;
#[cfg(test)]
mod tests;

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;
use migration::guest::{CpuProfile, MachineLayout};
use vmm_sys_util::eventfd::EventFd;

use crate::api::{MachineState, Metrics};
use crate::builder::Sockets;
use crate::config::MachineConfig;
use crate::device::Device;
use crate::device::bus::Bus;
use crate::device::keyboard::Keyboard;
use crate::device::serial::Console;
use crate::device::virtio::balloon::Balloon;
use crate::device::virtio::block::Block;
use crate::device::virtio::net::Net;
use crate::disk::RawDisk;
use crate::kvm::Capabilities;
use crate::memory::{DirtyTracker, Memory, Slots};
use crate::vcpu::ring_choice::Tracking;
use crate::vcpu::{StopReason, Vcpus};

pub use digest::DigestError;
pub use error::MachineError;
pub use state::StateFailure;

/// How long a machine that has come back waits for its disks on shared storage: the other host may still be letting go of them.
const TAKE_BACK: Duration = Duration::from_secs(10);

/// The virtio devices, in the order in which the guest sees them.
#[derive(Default)]
pub(crate) struct Devices {
    pub(crate) blocks: Vec<Block>,
    pub(crate) nets: Vec<Net>,
    pub(crate) balloon: Option<Balloon>,
}

impl Devices {
    fn all(&self) -> impl Iterator<Item = &dyn Device> {
        let blocks = self.blocks.iter().map(|block| block as &dyn Device);
        let nets = self.nets.iter().map(|net| net as &dyn Device);
        blocks.chain(nets).chain(self.balloon.iter().map(|balloon| balloon as &dyn Device))
    }
}

/// What a builder hands over.
pub(crate) struct Parts {
    /// First, because fields are dropped in their order: the threads end before anything that they use.
    pub(crate) vcpus: Vcpus,
    pub(crate) config: MachineConfig,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) capabilities: Capabilities,
    pub(crate) memory: Memory,
    pub(crate) slots: Arc<Slots>,
    pub(crate) tracker: Arc<DirtyTracker>,
    pub(crate) tracking: Tracking,
    pub(crate) msrs: Vec<u32>,
    pub(crate) profile: CpuProfile,
    pub(crate) bus: Bus,
    pub(crate) console: Console,
    pub(crate) keyboard: Keyboard,
    pub(crate) disks: Vec<Arc<RawDisk>>,
    pub(crate) stopped: EventFd,
}

/// A virtual machine in this process.
pub struct Machine {
    parts: Parts,
    devices: OnceLock<Devices>,
    state: Mutex<MachineState>,
    transition: Mutex<Transition>,
}

/// What waits for the next resume or restore.
#[derive(Default)]
struct Transition {
    sockets: Option<Sockets>,
    restored: Option<state::Restored>,
}

impl Machine {
    pub(crate) fn new(parts: Parts, devices: Devices) -> Self {
        Self {
            parts,
            devices: OnceLock::from(devices),
            state: Mutex::new(MachineState::Paused),
            transition: Mutex::default(),
        }
    }

    pub(crate) fn waiting(parts: Parts, sockets: Sockets) -> Self {
        Self {
            parts,
            devices: OnceLock::new(),
            state: Mutex::new(MachineState::Incoming),
            transition: Mutex::new(Transition { sockets: Some(sockets), restored: None }),
        }
    }

    /// How it was configured.
    pub fn config(&self) -> &MachineConfig {
        &self.parts.config
    }

    /// What a destination has to build.
    pub fn layout(&self) -> MachineLayout {
        MachineLayout {
            machine: self.config().name.clone(),
            vcpus: self.config().vcpus,
            memory: self.memory().regions().to_vec(),
            disks: self.moving_disks().map(|disk| disk.layout()).collect(),
            devices: self.slots(),
            cpu: self.profile().clone(),
        }
    }

    /// Its memory.
    pub fn memory(&self) -> &Memory {
        &self.parts.memory
    }

    /// Its record of written pages.
    pub fn tracker(&self) -> &Arc<DirtyTracker> {
        &self.parts.tracker
    }

    /// How its written pages are recorded, and why not otherwise.
    pub fn tracking(&self) -> &Tracking {
        &self.parts.tracking
    }

    /// The processor that the guest knows.
    pub fn profile(&self) -> &CpuProfile {
        &self.parts.profile
    }

    /// Its console.
    pub fn console(&self) -> &Console {
        &self.parts.console
    }

    /// Becomes readable when the machine stops by itself.
    pub fn stopped_event(&self) -> std::os::fd::RawFd {
        self.parts.stopped.as_raw_fd()
    }

    /// What it is doing.
    pub fn state(&self) -> MachineState {
        match (*lock(&self.state), self.stop_reason()) {
            (MachineState::Running | MachineState::Paused, Some(_)) => MachineState::Stopped,
            (state, _) => state,
        }
    }

    /// Why it stopped by itself, if it did.
    pub fn stop_reason(&self) -> Option<StopReason> {
        self.parts.vcpus.stop_reason()
    }

    /// When its first vCPU first entered the guest.
    pub fn first_entry(&self) -> Option<Instant> {
        self.parts.vcpus.first_entry()
    }

    /// Lets disks finish what is in flight, so that the pause that must follow at once has little to wait for. Their queues
    /// stand still from here until the resume.
    ///
    /// # Errors
    ///
    /// [`MachineError::Device`] if a device cannot finish its work; the machine then runs on.
    pub fn settle(&self) -> Result<(), MachineError> {
        let _transition = lock(&self.transition);
        if *lock(&self.state) != MachineState::Running {
            return Ok(());
        }
        if let Err(error) = self.devices().all().try_for_each(Device::settle) {
            self.devices().all().try_for_each(Device::resume)?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Stops vCPUs, then devices. Idempotent.
    ///
    /// # Errors
    ///
    /// [`MachineError::Device`] if a device cannot finish its work; the machine then runs on. [`MachineError::Stopped`] if it
    /// has stopped by itself: there is nothing to save or to migrate.
    pub fn pause(&self) -> Result<(), MachineError> {
        let _transition = lock(&self.transition);
        match *lock(&self.state) {
            MachineState::Paused | MachineState::Fenced => return Ok(()),
            MachineState::Running => {}
            state => return Err(MachineError::State { state, action: "paused", remedy: "" }),
        }
        self.parts.vcpus.park();
        if let Some(reason) = self.stop_reason() {
            return Err(MachineError::Stopped(reason));
        }
        if let Err(error) = self.devices().all().try_for_each(Device::pause) {
            self.run()?;
            return Err(error.into());
        }
        *lock(&self.state) = MachineState::Paused;
        Ok(())
    }

    /// Starts devices, then vCPUs. Idempotent.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`] while fenced, before it was restored, or after it stopped by itself.
    pub fn resume(&self) -> Result<(), MachineError> {
        let mut transition = lock(&self.transition);
        let refuse = |state, remedy| Err(MachineError::State { state, action: "resumed", remedy });
        match self.state() {
            MachineState::Running => return Ok(()),
            MachineState::Paused => {}
            MachineState::Fenced => {
                return refuse(MachineState::Fenced, ", it may run at its destination: ask there, then settle");
            }
            state => return refuse(state, ""),
        }
        if let Some(restored) = &transition.restored {
            restored.start_clocks(&self.parts)?;
            transition.restored = None;
        }
        self.run()
    }

    fn run(&self) -> Result<(), MachineError> {
        let parts = &self.parts;
        parts.tracker.before_run()?;
        self.devices().all().try_for_each(Device::resume)?;
        parts.vcpus.with(|vcpus| {
            for vcpu in vcpus {
                crate::vcpu::state::notify_stopped(vcpu, &parts.capabilities);
            }
        });
        // Before they do: nobody may take the machine for parked while it runs.
        *lock(&self.state) = MachineState::Running;
        parts.vcpus.run();
        Ok(())
    }

    /// Forbids it to run here, until [`Machine::unfence`], and leaves its disks on shared storage to the other host. Idempotent; the
    /// machine must be paused.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`] if it is not paused, [`MachineError::Disk`] if a disk cannot be left; it is not fenced then.
    pub fn fence(&self) -> Result<(), MachineError> {
        self.change("fenced", MachineState::Fenced, Self::hand_over_disks)
    }

    /// Lifts the fence, once it has its disks on shared storage back. Idempotent.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`] if it is neither fenced nor paused, [`MachineError::Disk`] if a disk is in use; it is still fenced then.
    pub fn unfence(&self) -> Result<(), MachineError> {
        self.change("unfenced", MachineState::Paused, |machine| machine.take_over_disks(TAKE_BACK))
    }

    fn change(
        &self,
        action: &'static str,
        to: MachineState,
        disks: impl FnOnce(&Self) -> Result<(), MachineError>,
    ) -> Result<(), MachineError> {
        let _transition = lock(&self.transition);
        let state = *lock(&self.state);
        if !matches!(state, MachineState::Paused | MachineState::Fenced) {
            return Err(MachineError::State { state, action, remedy: "" });
        }
        disks(self)?;
        *lock(&self.state) = to;
        Ok(())
    }

    /// Asks the guest to shut down, as Ctrl-Alt-Del does on a PC; whether and when it does is up to the guest.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`] if it does not run, [`MachineError::Deaf`] if no driver would see it.
    pub fn ask_to_shut_down(&self) -> Result<(), MachineError> {
        let _transition = lock(&self.transition);
        match self.state() {
            MachineState::Running if self.parts.keyboard.press() => Ok(()),
            MachineState::Running => Err(MachineError::Deaf),
            state => Err(MachineError::State { state, action: "asked to shut down", remedy: "" }),
        }
    }

    /// Stops it for good, because a part of it is lost. Returns at once; vCPUs stop at their next instruction boundary.
    pub fn fail(&self, reason: &str) {
        self.parts.vcpus.stop_handle().stop(StopReason::Failure(reason.to_owned()));
    }

    /// True while no vCPU can run.
    pub fn is_parked(&self) -> bool {
        *lock(&self.state) != MachineState::Running
    }

    /// Holds each vCPU for this share of its time from here on, in per cent; those not named run freely. Returns at once.
    ///
    /// # Errors
    ///
    /// [`MachineError::Vcpu`] if the thread for it cannot be made.
    pub fn throttle(&self, percent: &[u8]) -> Result<(), MachineError> {
        Ok(self.parts.vcpus.throttle(percent)?)
    }

    /// For how long each vCPU has been held.
    pub fn held(&self) -> Vec<Duration> {
        self.parts.vcpus.held()
    }

    /// Tells the networks where the machine's MAC addresses are now.
    pub fn announce(&self) {
        self.devices().nets.iter().for_each(Net::announce);
    }

    /// Its balloon, if it has one and has been booted or restored.
    pub fn balloon(&self) -> Option<&Balloon> {
        self.devices().balloon.as_ref()
    }

    /// Counters of vCPUs and devices, and the memory of the process; its other counters are left at zero.
    pub fn metrics(&self) -> Metrics {
        let memory = self.parts.memory.usage();
        let mut metrics = Metrics {
            vcpu_us: self.parts.vcpus.processor_time().as_micros() as u64,
            memory_resident_bytes: memory.ram_bytes,
            overhead_bytes: memory.other_bytes,
            exits: self.parts.vcpus.exits(),
            vcpu_held_us: self.held().iter().sum::<Duration>().as_micros() as u64,
            ..Metrics::default()
        };
        let devices = self.devices();
        for counters in devices.blocks.iter().map(Block::counters) {
            metrics.disk_read_bytes += counters.read_bytes.load(Ordering::Relaxed);
            metrics.disk_write_bytes += counters.write_bytes.load(Ordering::Relaxed);
        }
        for counters in devices.nets.iter().map(Net::counters) {
            metrics.net_receive_bytes += counters.receive_bytes.load(Ordering::Relaxed);
            metrics.net_transmit_bytes += counters.transmit_bytes.load(Ordering::Relaxed);
            metrics.net_announcements += counters.announced.load(Ordering::Relaxed);
        }
        metrics
    }

    fn devices(&self) -> &Devices {
        static NONE: Devices = Devices { blocks: Vec::new(), nets: Vec::new(), balloon: None };
        self.devices.get().unwrap_or(&NONE)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
