//! The virtio devices: transport and queues are virtio-drivers', the requests are ours, because nothing here may wait for
//! a device and because the notifications of both sides are kept to the few that are needed.
//!
//! The feature `VIRTIO_F_EVENT_IDX` is not taken: flags do the same for us at one store.

pub mod balloon;
pub mod block;
pub mod hal;
pub mod net;

use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{Ordering, fence};

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::mmio::{MmioError, MmioTransport};
use virtio_drivers::transport::{DeviceType, Transport};

use crate::protocol::command_line::MmioDevice;
use crate::ring0;
use hal::Hal;

/// `VIRTIO_F_VERSION_1` (Virtio 1.2, 6).
pub const VERSION_1: u64 = 1 << 32;

const INTERRUPT_ACK: usize = 0x64;
/// Used-ring update and configuration change.
const INTERRUPT_BITS: u32 = 3;

/// Why a device is not used.
pub enum Unusable {
    /// The registers say so.
    Registers(MmioError),
    /// It is no virtio 1.0 device.
    Legacy,
    /// It refuses its setup.
    Setup(virtio_drivers::Error),
}

impl fmt::Display for Unusable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registers(error) => error.fmt(formatter),
            Self::Legacy => {
                formatter.write_str("it is no virtio 1.0 device (QEMU: -global virtio-mmio.force-legacy=false)")
            }
            Self::Setup(error) => error.fmt(formatter),
        }
    }
}

impl From<virtio_drivers::Error> for Unusable {
    fn from(error: virtio_drivers::Error) -> Self {
        Self::Setup(error)
    }
}

/// A device's registers and its interrupt.
pub struct Device {
    transport: MmioTransport<'static>,
    acknowledge: *mut u32,
    source: usize,
}

impl Device {
    /// Looks at an announced window. `source` is the interrupt source that its GSI was routed to.
    pub fn new(window: &MmioDevice, source: usize) -> Result<Self, Unusable> {
        let base = NonNull::new(window.base as *mut u8).ok_or(Unusable::Registers(MmioError::MmioRegionTooSmall))?;
        // SAFETY: the VMM announced a virtio-mmio device there; device memory below 4 GiB is identity-mapped, and each
        // window is given to one driver only.
        let transport =
            unsafe { MmioTransport::new(base.cast(), window.size as usize) }.map_err(Unusable::Registers)?;
        if transport.requires_legacy_layout() {
            return Err(Unusable::Legacy);
        }
        Ok(Self { transport, acknowledge: (window.base as usize + INTERRUPT_ACK) as *mut u32, source })
    }

    /// What kind of device it is.
    pub fn kind(&self) -> DeviceType {
        self.transport.device_type()
    }

    /// Resets the device and agrees on those of `wanted` features that it offers.
    fn negotiate(&mut self, wanted: u64) -> Result<u64, Unusable> {
        use virtio_drivers::transport::DeviceStatus as Status;
        self.transport.set_status(Status::empty());
        self.transport.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        let features = self.transport.read_device_features() & (wanted | VERSION_1);
        self.transport.write_driver_features(features);
        self.transport.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        if features & VERSION_1 == 0 || !self.transport.get_status().contains(Status::FEATURES_OK) {
            return Err(Unusable::Setup(virtio_drivers::Error::Unsupported));
        }
        Ok(features)
    }

    /// Takes note of an interrupt, if there was one. To be called before the rings are looked at: then an edge of the
    /// interrupt line is never missed. True if there was one.
    pub fn acknowledge(&self) -> bool {
        let woken = ring0::take_wake(self.source);
        if woken {
            // SAFETY: InterruptACK of this device's window, identity-mapped and uncached.
            unsafe { self.acknowledge.write_volatile(INTERRUPT_BITS) }
        }
        woken
    }

    /// Tells the device that there is something in `queue`, unless it said that it looks anyway.
    fn notify<const SIZE: usize>(&mut self, queue: &VirtQueue<Hal, SIZE>, index: u16) {
        // The new available index must be visible before the device's flag is read (Virtio 1.2, 2.7.13.4.1).
        fence(Ordering::SeqCst);
        if queue.should_notify() {
            self.transport.notify(index);
        }
    }
}

/// Switches a queue's interrupts on or off and says whether it has something now, in an order in which either the answer
/// or an interrupt tells (Virtio 1.2, 2.7.7).
fn set_interrupts<const SIZE: usize>(queue: &mut VirtQueue<Hal, SIZE>, enable: bool) -> bool {
    queue.set_dev_notify(enable);
    fence(Ordering::SeqCst);
    queue.can_pop()
}
