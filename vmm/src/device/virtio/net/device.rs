//! The network card as the machine sees it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use migration::guest::{DeviceSlot, StatePayload};

use super::announce::{Addresses, Announcer};
use super::counters::NetCounters;
use super::space::config_space;
use super::state::{NetStateV2, VERSION};
use super::tap::Tap;
use super::worker::{NetWorker, Parts};
use super::{QUEUE_SIZE, QUEUES, feature};
use crate::device::virtio::mmio::MmioTransport;
use crate::device::virtio::{Interrupt, Model, Unit, Wiring, feature as common};
use crate::device::{Device, DeviceError, StateError, state};

/// Virtio device type (virtio 1.2, section 5).
const DEVICE_ID: u32 = 1;
/// A network card. It also implements [`crate::device::Device`].
pub struct Net {
    unit: Unit<NetWorker>,
    tap: Arc<Tap>,
    announcer: Arc<Announcer>,
    link_up: Arc<AtomicBool>,
    counters: Arc<NetCounters>,
}

impl Net {
    /// A new card.
    ///
    /// # Errors
    ///
    /// If its thread or descriptors cannot be made.
    pub fn new(tap: Tap, wiring: Wiring) -> Result<Self, DeviceError> {
        Self::build(tap, wiring, None)
    }

    /// A card as it was saved, paused.
    ///
    /// # Errors
    ///
    /// As [`Net::new`], or if the state does not fit.
    pub fn restore(tap: Tap, wiring: Wiring, state: &StatePayload) -> Result<Self, DeviceError> {
        let slot = slot(tap.id());
        let saved = NetStateV2::read(&slot, state)?;
        if saved.mac != tap.mac() {
            let what = format!(
                "the guest knows MAC address {:02x?}, the configuration says {:02x?}: configure the same on both hosts",
                saved.mac,
                tap.mac()
            );
            return Err(StateError::Unfit { device: slot.name, what }.into());
        }
        Self::build(tap, wiring, Some(&saved))
    }

    fn build(tap: Tap, wiring: Wiring, saved: Option<&NetStateV2>) -> Result<Self, DeviceError> {
        let DeviceSlot { name, version } = slot(tap.id());
        let notify = wiring.notify.len();
        let failed = |action| {
            let device = name.clone();
            move |source| DeviceError::Setup { device, action, source }
        };
        let kicks: Result<Vec<_>, _> = wiring.notify.iter().map(|notify| notify.try_clone()).collect();
        let kicks = kicks.map_err(failed("duplicate an eventfd"))?;
        let kicks =
            kicks.try_into().map_err(|_| DeviceError::Wiring { device: name.clone(), queues: QUEUES, notify })?;
        let tap = Arc::new(tap);
        let addresses = saved.map(|saved| Addresses::from_saved(&saved.addresses)).unwrap_or_default();
        let announcer = Arc::new(Announcer::new(addresses));
        let link_up = Arc::new(AtomicBool::new(true));
        let config = Arc::new(Mutex::new(config_space(tap.mac())));
        let interrupt = Arc::new(Interrupt::new(wiring.interrupt));
        let counters = Arc::new(NetCounters::default());
        let parts = Parts {
            ram: wiring.ram.clone(),
            interrupt: Arc::clone(&interrupt),
            config: Arc::clone(&config),
            counters: Arc::clone(&counters),
            link_up: Arc::clone(&link_up),
            announcer: Arc::clone(&announcer),
        };
        let backend = NetWorker::new(Arc::clone(&tap), kicks, parts).map_err(failed("set up epoll and a timer"))?;
        let features = common::COMMON | feature::OFFERED;
        let queue_sizes = vec![QUEUE_SIZE; QUEUES];
        let model = Model { name, device_id: DEVICE_ID, features, queue_sizes, state_version: version, writable: &[] };
        let transport = saved.map(|saved| &saved.transport);
        let unit = Unit::new(model, config, wiring.ram, Arc::clone(&interrupt), wiring.notify, backend, transport)?;
        if saved.is_some_and(|saved| !saved.link_up) {
            // The tap that was lost is another host's; here there is one.
            interrupt.config_changed();
        }
        Ok(Self { unit, tap, announcer, link_up, counters })
    }

    /// The registers, to be put on the bus.
    pub fn transport(&self) -> MmioTransport {
        self.unit.transport()
    }

    /// Tells the network where this card now is: RARP, gratuitous ARP and neighbour advertisements. They are sent by the caller, for whom no
    /// other thread must wake up first, and repeated a few times by the card's own thread, which also asks the guest to do what it
    /// can.
    pub fn announce(&self) {
        self.announcer.announce(&self.tap);
        if let Err(error) = self.unit.worker().post(NetWorker::repeat_announcement) {
            tracing::error!(%error, "cannot repeat the announcement of the guest");
        }
    }

    /// What passed.
    pub fn counters(&self) -> &Arc<NetCounters> {
        &self.counters
    }
}

impl Device for Net {
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
        let link_up = self.link_up.load(Ordering::SeqCst);
        let (mac, addresses) = (self.tap.mac(), self.announcer.saved());
        Ok(state::encode(self.slot(), &NetStateV2 { transport, mac, addresses, link_up })?)
    }
}

/// The slot of a card's device, for a layout that is told before the device is built.
pub fn slot(id: &str) -> DeviceSlot {
    DeviceSlot { name: format!("virtio-net/{id}"), version: VERSION }
}
