//! The state behind the registers: device status, feature negotiation and queue set-up (virtio 1.2, sections 2.1, 2.2 and
//! 3.1), independent of the register window itself.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::feature;
use super::interrupt::Interrupt;
use super::model::Model;
use super::queue::VirtQueue;
use super::state::{QueueStateV1, TransportStateV1};
use crate::memory::GuestRam;

/// Bits of the device status.
mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
    pub const BY_DRIVER: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// What the registers ask of the device's worker. Each call returns when it is done; false if the worker is gone.
pub trait Link: Send {
    /// Serve these queues. Without `wait` it may be done later, but before whatever is asked next.
    fn activate(&self, features: u64, queues: Vec<Option<VirtQueue>>, wait: bool) -> bool;
    /// Finish what is in flight of one queue and forget it.
    fn stop_queue(&self, index: usize) -> bool;
    /// Finish what is in flight and forget all queues.
    fn reset(&self) -> bool;
}

/// Which half of a 64-bit register is written.
#[derive(Clone, Copy)]
pub enum Half {
    Low,
    High,
}

/// Which address of a queue is written.
#[derive(Clone, Copy)]
pub enum Ring {
    Descriptors,
    Available,
    Used,
}

/// The registers of one device.
pub struct Registers {
    model: Model,
    status: u8,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    queues: Vec<QueueStateV1>,
    ram: GuestRam,
    interrupt: Arc<Interrupt>,
    notify: Vec<EventFd>,
    link: Box<dyn Link>,
    config: Arc<Mutex<Vec<u8>>>,
}

impl Registers {
    /// As after a reset. `config` is the configuration space, which the device may change.
    pub fn new(
        model: Model,
        config: Arc<Mutex<Vec<u8>>>,
        ram: GuestRam,
        interrupt: Arc<Interrupt>,
        notify: Vec<EventFd>,
        link: Box<dyn Link>,
    ) -> Self {
        let queues = fresh_queues(&model);
        Self {
            model,
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues,
            ram,
            interrupt,
            notify,
            link,
            config,
        }
    }

    /// `DeviceID`.
    pub fn device_id(&self) -> u32 {
        self.model.device_id
    }

    /// `InterruptStatus` and `InterruptACK` live here.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// `DeviceFeatures`: the selected 32 bits.
    pub fn device_features(&self) -> u32 {
        match self.device_features_select {
            0 => self.model.features as u32,
            1 => (self.model.features >> 32) as u32,
            _ => 0,
        }
    }

    /// `DeviceFeaturesSel`.
    pub fn select_device_features(&mut self, select: u32) {
        self.device_features_select = select;
    }

    /// `DriverFeaturesSel`.
    pub fn select_driver_features(&mut self, select: u32) {
        self.driver_features_select = select;
    }

    /// `DriverFeatures`: ignored once the features are settled.
    pub fn set_driver_features(&mut self, bits: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let half = match self.driver_features_select {
            0 => Half::Low,
            1 => Half::High,
            // There are no features there, so none can be accepted; whoever tries does not get FEATURES_OK.
            _ if bits != 0 => {
                self.driver_features = u64::MAX;
                return;
            }
            _ => return,
        };
        merge(&mut self.driver_features, half, bits);
    }

    /// `QueueSel`.
    pub fn select_queue(&mut self, select: u32) {
        self.queue_select = select;
    }

    /// `QueueNumMax` of the selected queue; 0 if there is none.
    pub fn queue_max(&self) -> u32 {
        self.model.queue_sizes.get(self.queue_select as usize).copied().map_or(0, u32::from)
    }

    /// `QueueReady` of the selected queue.
    pub fn queue_ready(&self) -> bool {
        self.queues.get(self.queue_select as usize).is_some_and(|queue| queue.ready)
    }

    /// The selected queue, while it may be changed: features are settled, the driver is not ready, the queue neither.
    fn changeable_queue(&mut self) -> Option<&mut QueueStateV1> {
        let mask = status::FEATURES_OK | status::DRIVER_OK | status::FAILED;
        if self.status & mask != status::FEATURES_OK {
            return None;
        }
        self.queues.get_mut(self.queue_select as usize).filter(|queue| !queue.ready)
    }

    /// `QueueNum`. An impossible size keeps the queue from becoming ready.
    pub fn set_queue_size(&mut self, size: u32) {
        if let Some(queue) = self.changeable_queue() {
            queue.size = u16::try_from(size).unwrap_or(0);
        }
    }

    /// `QueueDesc`, `QueueDriver`, `QueueDevice`.
    pub fn set_queue_address(&mut self, ring: Ring, half: Half, bits: u32) {
        if let Some(queue) = self.changeable_queue() {
            let address = match ring {
                Ring::Descriptors => &mut queue.descriptors,
                Ring::Available => &mut queue.available,
                Ring::Used => &mut queue.used,
            };
            merge(address, half, bits);
        }
    }

    /// `QueueReady`. A queue that is not possible does not become ready, and the device asks for a reset.
    pub fn set_queue_ready(&mut self, ready: bool) {
        let index = self.queue_select as usize;
        if !ready {
            if self.queue_ready() {
                self.queues[index].ready = false;
                if self.status & status::DRIVER_OK != 0 && !self.link.stop_queue(index) {
                    self.interrupt.mark_needs_reset();
                }
            }
        } else if let Some(queue) = self.changeable_queue() {
            queue.ready = true;
            if self.build_queue(index).is_none() {
                tracing::warn!(device = self.model.name, index, "the guest set up an impossible virtqueue");
                self.queues[index].ready = false;
                self.interrupt.mark_needs_reset();
            }
        }
    }

    fn build_queue(&self, index: usize) -> Option<VirtQueue> {
        let event_idx = self.driver_features & feature::EVENT_IDX != 0;
        VirtQueue::new(&self.queues[index], self.model.queue_sizes[index], event_idx, &self.ram, &self.interrupt)
    }

    /// `QueueNotify`, where it reaches the registers instead of an ioeventfd.
    pub fn notify(&self, index: u32) {
        if let Some(Err(error)) = self.notify.get(index as usize).map(|notify| notify.write(1)) {
            tracing::warn!(device = self.model.name, %error, "cannot notify the worker");
        }
    }

    /// `Status`.
    pub fn status(&self) -> u8 {
        self.status | if self.interrupt.needs_reset() { status::NEEDS_RESET } else { 0 }
    }

    /// `Status`: 0 resets, anything else adds bits; what may not be added now is not.
    pub fn set_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        if self.status & status::FAILED != 0 {
            return;
        }
        let added = value & !self.status & status::BY_DRIVER;
        self.status |= added & (status::ACKNOWLEDGE | status::DRIVER);
        if added & status::FAILED != 0 {
            self.status |= status::FAILED;
            self.link.reset();
            return;
        }
        let known = status::ACKNOWLEDGE | status::DRIVER;
        if added & status::FEATURES_OK != 0 && self.status & known == known && self.features_are_possible() {
            self.status |= status::FEATURES_OK;
        }
        if added & status::DRIVER_OK != 0 && self.status & status::FEATURES_OK != 0 {
            self.status |= status::DRIVER_OK;
            self.activate(true);
        }
    }

    fn features_are_possible(&self) -> bool {
        self.driver_features & !self.model.features == 0 && self.driver_features & feature::VERSION_1 != 0
    }

    fn activate(&mut self, wait: bool) {
        let queues = (0..self.queues.len()).map(|index| self.build_queue(index)).collect();
        if !self.link.activate(self.driver_features, queues, wait) {
            self.interrupt.mark_needs_reset();
        }
    }

    fn reset(&mut self) {
        let gone = !self.link.reset();
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.queues = fresh_queues(&self.model);
        self.interrupt.reset();
        if gone {
            self.interrupt.mark_needs_reset();
        }
    }

    /// Configuration space; zeroes past its end.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = config.get(offset..).unwrap_or_default();
        let length = rest.len().min(data.len());
        data[..length].copy_from_slice(&rest[..length]);
        data[length..].fill(0);
    }

    /// Configuration space: what the driver may not write, and what is no whole field, is ignored.
    pub fn write_config(&self, offset: usize, data: &[u8]) {
        let end = offset.saturating_add(data.len());
        let fits = |range: &Range<usize>| range.start <= offset && end <= range.end;
        if self.status & status::DRIVER == 0 || !self.model.writable.iter().any(fits) {
            return;
        }
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = config.get_mut(offset..end) {
            place.copy_from_slice(data);
        }
    }

    /// The device changes its configuration space.
    pub fn change_config(&self, change: impl FnOnce(&mut [u8])) {
        change(&mut self.config.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The state to travel; `progress` is what the paused worker says of its queues.
    pub fn save(&self, progress: &[Option<(u16, u16)>]) -> TransportStateV1 {
        let mut queues = self.queues.clone();
        for (queue, progress) in queues.iter_mut().zip(progress) {
            if let Some((next_avail, next_used)) = *progress {
                (queue.next_avail, queue.next_used) = (next_avail, next_used);
            }
        }
        TransportStateV1 {
            status: self.status,
            needs_reset: self.interrupt.needs_reset(),
            driver_features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.generation(),
            queues,
        }
    }

    /// Puts a saved state in place of that after a reset; the worker is paused.
    ///
    /// # Errors
    ///
    /// What does not fit, in words.
    pub fn restore(&mut self, state: &TransportStateV1) -> Result<(), String> {
        if state.status & !status::BY_DRIVER != 0 {
            return Err(format!("device status {:#x} is impossible", state.status));
        }
        if state.queues.len() != self.queues.len() {
            return Err(format!("it has {} queues, this device {}", state.queues.len(), self.queues.len()));
        }
        self.driver_features = state.driver_features;
        if state.status & status::FEATURES_OK != 0 && !self.features_are_possible() {
            return Err(format!(
                "the guest uses features {:#x}, this host offers {:#x}",
                state.driver_features, self.model.features
            ));
        }
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.queues.clone_from(&state.queues);
        for index in 0..self.queues.len() {
            if self.queues[index].ready && self.build_queue(index).is_none() {
                return Err(format!("queue {index} is impossible: {:?}", self.queues[index]));
            }
        }
        self.interrupt.restore(state.interrupt_status, state.needs_reset, state.config_generation);
        if self.status & status::DRIVER_OK != 0 && self.status & status::FAILED == 0 {
            // The vCPUs of a restored device do not run yet, and a switchover does.
            self.activate(false);
        }
        Ok(())
    }
}

fn fresh_queues(model: &Model) -> Vec<QueueStateV1> {
    model.queue_sizes.iter().map(|&size| QueueStateV1 { size, ..QueueStateV1::default() }).collect()
}

fn merge(value: &mut u64, half: Half, bits: u32) {
    *value = match half {
        Half::Low => *value & !0xffff_ffff | u64::from(bits),
        Half::High => *value & 0xffff_ffff | u64::from(bits) << 32,
    };
}
