//! The machine that arrives.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migration::guest::{
    DestinationDisk, DestinationGuest, DeviceSlot, DiskLayout, GuestError, GuestResult, MachineLayout, Missing,
    StatePayload,
};
use migration::page::Bitmap;

use super::{explain, room};
use crate::builder::BuildError;
use crate::config::{MachineConfig, ReceiveConfig};
use crate::device::keyboard;
use crate::memory::{self, DirtyTracker, uffd};
use crate::vm::Machine;

/// What arrives does not fit what was configured here.
#[derive(Debug, thiserror::Error)]
pub enum Mismatch {
    /// A number or name.
    #[error(
        "{what} differs: the source has {source_value}, this host was configured with {here}: configure the same at both"
    )]
    Differs {
        /// What differs.
        what: String,
        /// At the source.
        source_value: String,
        /// Here.
        here: String,
    },
    /// A device here that the source does not have, or the other way round.
    #[error("device {0} is not at both hosts: configure the same disks and networks, with the same ids, at both")]
    Device(String),
    /// A state that this build does not know.
    #[error(
        "the source saves {device} in version {found}, this host knows up to {known}: update headroom-vmm on this host"
    )]
    Version {
        /// Which device.
        device: String,
        /// At the source.
        found: u16,
        /// Here.
        known: u16,
    },
    /// Asked for before `prepare`.
    #[error("no machine has been prepared on this host yet: the source broke the order of the protocol")]
    NotPrepared,
}

/// The source has left a disk on shared storage before it said so; a server of locks may need a moment to notice.
const TAKE_OVER: Duration = Duration::from_secs(1);

/// Where a machine is kept once it is there.
pub type Place = Arc<Mutex<Option<Arc<Machine>>>>;

/// An expected machine, seen by the destination's engine.
pub struct Arrival {
    config: MachineConfig,
    place: Place,
    mark: Option<Arc<File>>,
    /// Parts of it come after it runs.
    late: AtomicBool,
}

impl Arrival {
    /// A machine will be built from `config` and put into `place`. Before it runs, `mark` is written to.
    pub fn new(config: MachineConfig, place: Place, mark: Option<File>) -> Self {
        let mark = mark.map(Arc::new);
        Self { config, place, mark, late: AtomicBool::new(false) }
    }

    /// Not durable yet: that would cost the guest milliseconds of its downtime; see [`Arrival::settle_mark`].
    fn mark(&self) -> GuestResult<()> {
        let late = self.late.load(Ordering::Relaxed);
        let words = if late { ReceiveConfig::RAN_INCOMPLETE } else { ReceiveConfig::RAN };
        let written = self.mark.as_ref().map_or(Ok(()), |file| file.write_all_at(words.as_bytes(), 0));
        written
            .map_err(|error| GuestError::new(format!("the mark that the machine runs here cannot be written: {error}")))
    }

    /// Makes the mark durable while the guest runs already. Should this host lose power in the milliseconds until then, and the link
    /// to the source at the same time, what the guest has done in them is lost.
    fn settle_mark(&self) {
        let Some(mark) = self.mark.clone() else { return };
        let sync = move || {
            if let Err(error) = mark.sync_data() {
                tracing::warn!(%error, "the mark that the machine runs here may not outlive a loss of power");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("mark".to_owned()).spawn(sync) {
            tracing::warn!(%error, "the mark that the machine runs here is not made durable");
        }
    }

    /// All of it is here.
    fn mark_complete(&self) {
        if !self.late.swap(false, Ordering::Relaxed) {
            return;
        }
        let words = ReceiveConfig::RAN.as_bytes();
        // Shortened first: whatever is in between is no longer the mark of a machine that lacks something.
        let write = |file: &File| {
            file.set_len(words.len() as u64)?;
            file.write_all_at(words, 0)?;
            file.sync_data()
        };
        if let Some(Err(error)) = self.mark.as_deref().map(write) {
            tracing::error!(%error, "the mark still says that the machine lacks a part of itself");
        }
    }

    fn unmark(&self) {
        if let Some(Err(error)) = self.mark.as_ref().map(|file| file.set_len(0)) {
            tracing::error!(%error, "the mark that the machine runs here stays, although it does not");
        }
    }

    fn machine(&self) -> GuestResult<Arc<Machine>> {
        self.lock().clone().ok_or_else(|| explain(Mismatch::NotPrepared))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Machine>>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DestinationGuest for Arrival {
    fn prepare(&self, layout: &MachineLayout) -> GuestResult<()> {
        check_shape(&self.config, layout).map_err(explain)?;
        room::check(layout.memory.iter().map(|region| region.bytes).sum()).map_err(explain)?;
        let build = || -> Result<Machine, BuildError> { Machine::incoming(self.config.clone(), &layout.cpu) };
        let machine = build().map_err(explain)?;
        check_parts(&machine, layout).map_err(explain)?;
        let machine = Arc::new(machine);
        begin_tracking(machine.tracker());
        *self.lock() = Some(machine);
        Ok(())
    }

    fn prepare_pages(&self, pages: Range<u64>) {
        if let Ok(machine) = self.machine() {
            machine.memory().prepare_pages(pages);
        }
    }

    fn write_pages(&self, first: u64, data: &[u8]) -> GuestResult<()> {
        self.machine()?.memory().write_pages(first, data).map_err(explain)
    }

    fn zero_pages(&self, pages: Range<u64>) -> GuestResult<()> {
        self.machine()?.memory().zero_pages(pages).map_err(explain)
    }

    fn restore_state(&self, payloads: &[StatePayload]) -> GuestResult<()> {
        let machine = self.machine()?;
        // Logging begins before the state is restored: KVM itself writes to guest memory when some MSRs are set, and
        // the verification must not take that for an error of the transfer.
        machine.tracker().start().map_err(explain)?;
        machine.restore_state(payloads, true).map_err(explain)
    }

    fn resume(&self) -> GuestResult<()> {
        let machine = self.machine()?;
        for disk in machine.moving_disks() {
            disk.start_dirty_tracking();
        }
        machine.take_over_disks(TAKE_OVER).map_err(explain)?;
        let run = || {
            self.mark()?;
            machine.resume().map_err(explain).inspect_err(|_| self.unmark())
        };
        if let Err(error) = run() {
            // Before the source is told, which takes them back.
            if let Err(error) = machine.hand_over_disks() {
                tracing::error!(%error, "a disk on shared storage stays locked until this process ends");
            }
            return Err(error);
        }
        self.settle_mark();
        machine.announce();
        Ok(())
    }

    fn collect_dirty(&self, into: &mut Bitmap) -> GuestResult<()> {
        let machine = self.machine()?;
        machine.tracker().collect(into, machine.is_parked()).map_err(explain)
    }

    fn stop_dirty_tracking(&self) -> GuestResult<()> {
        let machine = self.machine()?;
        self.mark_complete();
        machine.tracker().stop().map_err(explain)
    }

    fn read_pages(&self, first: u64, buffer: &mut [u8]) -> GuestResult<()> {
        self.machine()?.memory().read_pages(first, buffer).map_err(explain)
    }

    fn disks(&self) -> Vec<Arc<dyn DestinationDisk>> {
        let machine = self.lock();
        let disks = machine.iter().flat_map(|machine| machine.moving_disks());
        disks.map(|disk| Arc::clone(disk) as Arc<dyn DestinationDisk>).collect()
    }

    fn discard(&self) {
        // Dropped outside of the lock: ending threads and unmapping memory takes a while.
        let machine = self.lock().take();
        drop(machine);
    }

    fn postcopy(&self) -> GuestResult<()> {
        Ok(uffd::check()?)
    }

    fn forget_pages(&self, pages: &Bitmap) -> GuestResult<()> {
        self.machine()?.memory().forget_pages(pages).map_err(explain)
    }

    fn expect_pages(&self, missing: &Bitmap) -> GuestResult<Arc<dyn Missing>> {
        self.late.store(true, Ordering::Relaxed);
        Ok(Arc::new(uffd::LatePages::new(self.machine()?.memory(), missing)?))
    }

    fn lose(&self, reason: &str) {
        if let Ok(machine) = self.machine() {
            machine.fail(reason);
        }
    }
}

/// KVM takes milliseconds to give the guest its memory. Who needs it waits for the rest of them, begins anew if this came to
/// nothing, and says why. The machine itself may be discarded meanwhile: its disks and networks are free at once.
fn begin_tracking(tracker: &Arc<DirtyTracker>) {
    let tracker = Arc::clone(tracker);
    let begin = move || drop(tracker.start());
    if let Err(error) = std::thread::Builder::new().name("slots".to_owned()).spawn(begin) {
        tracing::debug!(%error, "the guest gets its memory later");
    }
}

fn differs(what: impl Into<String>, source: impl std::fmt::Debug, here: impl std::fmt::Debug) -> Mismatch {
    Mismatch::Differs { what: what.into(), source_value: format!("{source:?}"), here: format!("{here:?}") }
}

/// What can be compared before anything is built.
fn check_shape(config: &MachineConfig, layout: &MachineLayout) -> Result<(), Mismatch> {
    if config.name != layout.machine {
        return Err(differs("the machine's name", &layout.machine, &config.name));
    }
    if config.vcpus != layout.vcpus {
        return Err(differs("the number of vCPUs", layout.vcpus, config.vcpus));
    }
    let regions = memory::regions(config.memory_mib);
    if regions != layout.memory {
        return Err(differs("guest memory", &layout.memory, regions));
    }
    Ok(())
}

fn check_parts(machine: &Machine, layout: &MachineLayout) -> Result<(), Mismatch> {
    check_slots(&machine.slots(), &layout.devices)?;
    let disks: Vec<DiskLayout> = machine.moving_disks().map(|disk| disk.layout()).collect();
    if disks.len() != layout.disks.len() {
        return Err(differs("the number of disks", layout.disks.len(), disks.len()));
    }
    for (here, source) in disks.into_iter().zip(&layout.disks) {
        if here.id != source.id {
            return Err(differs("the order of the disks", &source.id, &here.id));
        }
        if here.bytes != source.bytes {
            return Err(differs(format!("the size of disk {} in bytes", here.id), source.bytes, here.bytes));
        }
        if here.read_only != source.read_only {
            return Err(differs(format!("read_only of disk {}", here.id), source.read_only, here.read_only));
        }
    }
    Ok(())
}

fn check_slots(here: &[DeviceSlot], source: &[DeviceSlot]) -> Result<(), Mismatch> {
    for slot in source {
        match here.iter().find(|known| known.name == slot.name) {
            None => return Err(Mismatch::Device(slot.name.clone())),
            Some(known) if slot.version > known.version => {
                let (device, found, known) = (slot.name.clone(), slot.version, known.version);
                return Err(Mismatch::Version { device, found, known });
            }
            Some(_) => {}
        }
    }
    // A source of a build before the keyboard has none to tell of.
    let extra = |known: &&DeviceSlot| **known != keyboard::slot() && !source.iter().any(|slot| slot.name == known.name);
    match here.iter().find(extra) {
        Some(extra) => Err(Mismatch::Device(extra.name.clone())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(names: &[(&str, u16)]) -> Vec<DeviceSlot> {
        names.iter().map(|&(name, version)| DeviceSlot { name: name.into(), version }).collect()
    }

    #[test]
    fn devices_must_be_the_same_and_not_newer() {
        let here = slots(&[("serial", 2), ("virtio-net/net0", 1)]);
        assert!(check_slots(&here, &slots(&[("virtio-net/net0", 1), ("serial", 1)])).is_ok());
        let newer = check_slots(&here, &slots(&[("serial", 3), ("virtio-net/net0", 1)])).unwrap_err();
        assert!(matches!(newer, Mismatch::Version { found: 3, known: 2, .. }));
        let other = check_slots(&here, &slots(&[("serial", 1), ("virtio-net/lan", 1)])).unwrap_err();
        assert!(other.to_string().contains("virtio-net/lan"));
        let fewer = check_slots(&here, &slots(&[("serial", 1)])).unwrap_err();
        assert!(fewer.to_string().contains("virtio-net/net0"));
        let newer = [here.clone(), vec![keyboard::slot()]].concat();
        assert!(check_slots(&newer, &here).is_ok(), "a source of an older build");
        assert!(check_slots(&here, &newer).is_err(), "a destination of an older build");
    }

    #[test]
    fn shape_is_compared_before_anything_is_built() {
        let config: MachineConfig = serde_json::from_str(r#"{"name": "vm1", "memory_mib": 64}"#).unwrap();
        let layout = MachineLayout {
            machine: "vm1".into(),
            vcpus: 1,
            memory: memory::regions(64),
            disks: vec![],
            devices: vec![],
            cpu: Default::default(),
        };
        assert!(check_shape(&config, &layout).is_ok());
        let more = MachineLayout { vcpus: 2, ..layout.clone() };
        assert!(check_shape(&config, &more).unwrap_err().to_string().contains("vCPUs differs: the source has 2"));
        let larger = MachineLayout { memory: memory::regions(128), ..layout.clone() };
        assert!(check_shape(&config, &larger).is_err());
        let other = MachineLayout { machine: "vm2".into(), ..layout };
        assert!(check_shape(&config, &other).is_err());
    }
}
