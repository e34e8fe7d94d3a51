//! The disk device as the machine sees it.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use migration::guest::{DeviceSlot, StatePayload};

use super::counters::BlockCounters;
use super::state::{BlockStateV1, VERSION};
use super::worker::BlockWorker;
use super::{QUEUE_SIZE, QUEUES, RANGE_SECTORS_MAX, RANGES_MAX, SEGMENTS_MAX, feature};
use crate::device::virtio::mmio::MmioTransport;
use crate::device::virtio::{Interrupt, Model, Unit, Wiring, feature as common};
use crate::device::{Device, DeviceError, StateError, state};
use crate::disk::{DiskError, RawDisk, SECTOR_BYTES};

/// Virtio device type (virtio 1.2, section 5).
const DEVICE_ID: u32 = 2;

/// Where the capacity stands in the configuration space, in sectors.
const CAPACITY: Range<usize> = 0..8;

/// A disk device. It also implements [`crate::device::Device`].
pub struct Block {
    unit: Unit<BlockWorker>,
    disk: Arc<RawDisk>,
    counters: Arc<BlockCounters>,
}

impl Block {
    /// A new device over `disk`.
    ///
    /// # Errors
    ///
    /// If its thread, ring or descriptors cannot be made.
    pub fn new(disk: Arc<RawDisk>, wiring: Wiring) -> Result<Self, DeviceError> {
        Self::build(disk, wiring, None)
    }

    /// A device as it was saved, paused.
    ///
    /// # Errors
    ///
    /// As [`Block::new`], or if the state does not fit.
    pub fn restore(disk: Arc<RawDisk>, wiring: Wiring, state: &StatePayload) -> Result<Self, DeviceError> {
        let slot = slot(disk.image().id());
        let saved: BlockStateV1 = state::decode(&slot, state)?;
        let layout = disk.layout();
        if (saved.bytes, saved.read_only) != (layout.bytes, layout.read_only) {
            let what = format!(
                "the guest knows a disk of {} bytes (read-only: {}), the image has {} (read-only: {})",
                saved.bytes, saved.read_only, layout.bytes, layout.read_only
            );
            return Err(StateError::Unfit { device: slot.name, what }.into());
        }
        Self::build(disk, wiring, Some(&saved))
    }

    fn build(disk: Arc<RawDisk>, wiring: Wiring, saved: Option<&BlockStateV1>) -> Result<Self, DeviceError> {
        let DeviceSlot { name, version } = slot(disk.image().id());
        if wiring.notify.len() != QUEUES {
            return Err(DeviceError::Wiring { device: name, queues: QUEUES, notify: wiring.notify.len() });
        }
        let counters = Arc::new(BlockCounters::default());
        let interrupt = Arc::new(Interrupt::new(wiring.interrupt));
        let kick = wiring.notify[0].try_clone();
        let backend = kick
            .and_then(|kick| BlockWorker::new(Arc::clone(&disk), wiring.ram.clone(), kick, Arc::clone(&counters)))
            .map_err(|source| DeviceError::Setup { device: name.clone(), action: "set up io_uring", source })?;
        let config = Arc::new(Mutex::new(config_space(disk.image().bytes())));
        let features = common::COMMON
            | feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | if disk.image().is_read_only() { feature::RO } else { feature::DISCARD | feature::WRITE_ZEROES };
        let queue_sizes = vec![QUEUE_SIZE];
        let model = Model { name, device_id: DEVICE_ID, features, queue_sizes, state_version: version, writable: &[] };
        let transport = saved.map(|saved| &saved.transport);
        let unit = Unit::new(model, config, wiring.ram, interrupt, wiring.notify, backend, transport)?;
        Ok(Self { unit, disk, counters })
    }

    /// The registers, to be put on the bus.
    pub fn transport(&self) -> MmioTransport {
        self.unit.transport()
    }

    /// The disk behind it.
    pub fn disk(&self) -> &Arc<RawDisk> {
        &self.disk
    }

    /// Makes the disk larger and tells the driver, which finds the new capacity in the configuration space (virtio 1.2, sections
    /// 2.5.1 and 5.2.4). The driver hears of a paused device's new size once it runs. Returns when requests for the new sectors are
    /// served.
    ///
    /// # Errors
    ///
    /// As [`RawDisk::grow`].
    pub fn grow(&self, bytes: u64) -> Result<(), DiskError> {
        if bytes != self.disk.image().bytes() {
            self.disk.grow(bytes)?;
            let sectors = (bytes / SECTOR_BYTES).to_le_bytes();
            self.unit.change_config(|space| space[CAPACITY].copy_from_slice(&sectors));
        }
        Ok(())
    }

    /// What the guest did.
    pub fn counters(&self) -> &Arc<BlockCounters> {
        &self.counters
    }
}

impl Device for Block {
    fn slot(&self) -> DeviceSlot {
        self.unit.slot().clone()
    }

    fn settle(&self) -> Result<(), DeviceError> {
        self.unit.settle()
    }

    fn pause(&self) -> Result<(), DeviceError> {
        self.unit.pause()
    }

    fn resume(&self) -> Result<(), DeviceError> {
        self.unit.resume()
    }

    fn save(&self) -> Result<StatePayload, DeviceError> {
        let transport = self.unit.save()?;
        let layout = self.disk.layout();
        let saved = BlockStateV1 { transport, bytes: layout.bytes, read_only: layout.read_only };
        Ok(state::encode(self.slot(), &saved)?)
    }
}

/// The slot of the disk `id`, for a layout that is told before the device is built.
pub fn slot(id: &str) -> DeviceSlot {
    DeviceSlot { name: format!("virtio-block/{id}"), version: VERSION }
}

/// Configuration space (virtio 1.2, section 5.2.4).
fn config_space(bytes: u64) -> Vec<u8> {
    let mut space = vec![0; 60];
    let mut put = |offset: usize, value: &[u8]| space[offset..offset + value.len()].copy_from_slice(value);
    put(CAPACITY.start, &(bytes / SECTOR_BYTES).to_le_bytes());
    put(12, &SEGMENTS_MAX.to_le_bytes());
    put(20, &(SECTOR_BYTES as u32).to_le_bytes());
    put(34, &(QUEUES as u16).to_le_bytes());
    // Discard: sectors in a range, ranges, alignment in sectors (one page, that of most file systems).
    put(36, &RANGE_SECTORS_MAX.to_le_bytes());
    put(40, &RANGES_MAX.to_le_bytes());
    put(44, &8u32.to_le_bytes());
    // Write zeroes: sectors in a range, ranges, and that their space may be given back.
    put(48, &RANGE_SECTORS_MAX.to_le_bytes());
    put(52, &RANGES_MAX.to_le_bytes());
    put(56, &[1]);
    space
}
