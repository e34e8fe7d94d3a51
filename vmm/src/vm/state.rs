//! State of the whole machine as payloads, one for each holder.
//!
//! Restore goes from the processors outwards and back: vCPUs with their LAPICs, then devices, then the interrupt
//! controllers. KVM re-delivers what is pending in the IOAPIC to the LAPICs when the former is set, so that these must be
//! there; and whatever a device's constructor does to its line is overwritten by the lines' saved state. Clocks come when the
//! machine resumes.

use migration::guest::{DeviceSlot, StatePayload};

use super::{Devices, Machine, MachineError, Parts, lock};
use crate::api::MachineState;
use crate::builder::BuildError;
use crate::device::state::{StateError, decode, encode};
use crate::device::virtio::balloon::{self, Balloon};
use crate::device::virtio::block::{self, Block};
use crate::device::virtio::net::{self, Net};
use crate::device::{DeviceError, keyboard, serial};
use crate::kvm::KvmError;
use crate::kvm::clock::{ClockStateV1, PendingClock, start_tsc};
use crate::kvm::irq::IrqchipStateV1;
use crate::memory::TrackError;
use crate::vcpu::VcpuError;
use crate::vcpu::state::VcpuStateV1;

/// State cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateFailure {
    /// Not now.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A payload.
    #[error(transparent)]
    Payload(#[from] StateError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Putting restored devices in place.
    #[error(transparent)]
    Build(#[from] Box<BuildError>),
    /// Not all payloads are there.
    #[error("the saved state lacks {0}: both hosts must configure the same devices in the same order")]
    Missing(String),
    /// More payloads than holders.
    #[error("the saved state holds {0}, which this machine does not have: both hosts must configure the same devices")]
    Surplus(String),
}

/// What a restored machine still needs when it resumes.
pub(super) struct Restored {
    clock: PendingClock,
    vcpus: Vec<VcpuStateV1>,
}

impl Restored {
    /// Lets kvm-clock, the TSCs and the LAPIC timers go on, in this order.
    pub(super) fn start_clocks(&self, parts: &Parts) -> Result<(), KvmError> {
        parts.vcpus.with(|fds| {
            let tsc = self.clock.start(&parts.vm)?;
            let offsets: Vec<_> = self.vcpus.iter().map(VcpuStateV1::tsc_offset).collect();
            start_tsc(fds, &offsets, tsc)?;
            fds.iter().zip(&self.vcpus).try_for_each(|(fd, state)| state.start_timer(fd))
        })
    }
}

/// Of what the machine keeps by itself, all in its first version.
fn slot(name: impl Into<String>) -> DeviceSlot {
    DeviceSlot { name: name.into(), version: 1 }
}

fn vcpu_slot(id: usize) -> DeviceSlot {
    slot(format!("vcpu/{id}"))
}

impl Machine {
    /// Names and versions of all payloads that this machine has, in their order.
    pub fn slots(&self) -> Vec<DeviceSlot> {
        let config = self.config();
        let vcpus = (0..usize::from(config.vcpus)).map(vcpu_slot);
        let blocks = config.disks.iter().map(|disk| block::slot(&disk.id));
        let nets = config.networks.iter().map(|network| net::slot(&network.id));
        let balloon = config.balloon.iter().map(|_| balloon::slot());
        let devices = blocks.chain(nets).chain(balloon);
        vcpus.chain([slot("clock"), serial::slot(), keyboard::slot()]).chain(devices).chain([slot("irqchip")]).collect()
    }

    /// The state of everything but memory and disks.
    ///
    /// # Errors
    ///
    /// [`StateFailure`] if the machine runs, or KVM or a device refuses.
    pub fn save_state(&self) -> Result<Vec<StatePayload>, StateFailure> {
        let _transition = lock(&self.transition);
        match *lock(&self.state) {
            MachineState::Paused | MachineState::Fenced => {}
            state => return Err(MachineError::State { state, action: "saved", remedy: ", pause it first" }.into()),
        }
        let parts = &self.parts;
        let mut payloads = Vec::with_capacity(8);
        parts.vcpus.with(|fds| -> Result<(), StateFailure> {
            payloads.push(encode(slot("clock"), &ClockStateV1::save(&parts.vm, fds[0], parts.profile.tsc_khz)?)?);
            for (id, fd) in fds.iter().enumerate() {
                let state = VcpuStateV1::save(fd, &parts.msrs, &parts.capabilities)?;
                payloads.push(encode(vcpu_slot(id), &state)?);
            }
            Ok(())
        })?;
        payloads.push(parts.console.save()?);
        payloads.push(parts.keyboard.save()?);
        for device in self.devices().all() {
            payloads.push(device.save()?);
        }
        // Last: by now no device raises an interrupt any more.
        payloads.push(encode(slot("irqchip"), &IrqchipStateV1::save(&parts.vm)?)?);
        Ok(payloads)
    }

    /// Makes an incoming machine what it was; it is paused then. `advance`: guest time goes on during the move.
    ///
    /// # Errors
    ///
    /// [`StateFailure`] if a payload is missing, damaged or does not fit; the machine is then of no use any more.
    pub fn restore_state(&self, payloads: &[StatePayload], advance: bool) -> Result<(), StateFailure> {
        self.memory().arrived();
        let mut transition = lock(&self.transition);
        let sockets = transition.sockets.take().ok_or(MachineError::State {
            state: self.state(),
            action: "restored",
            remedy: ", only a new incoming machine can",
        })?;
        let parts = &self.parts;
        parts.slots.provide().map_err(TrackError::from).map_err(MachineError::from)?;
        let expected = self.slots();
        if let Some(surplus) =
            payloads.iter().find(|payload| !expected.iter().any(|slot| slot.name == payload.slot.name))
        {
            return Err(StateFailure::Surplus(surplus.slot.name.clone()));
        }
        let find = |slot: &DeviceSlot| {
            let found = payloads.iter().find(|payload| payload.slot.name == slot.name);
            found.ok_or_else(|| StateFailure::Missing(slot.name.clone()))
        };
        let get_clock = || -> Result<ClockStateV1, StateFailure> { Ok(decode(&slot("clock"), find(&slot("clock"))?)?) };
        let clock = PendingClock::new(get_clock()?, advance);
        let mut vcpus = Vec::with_capacity(parts.config.vcpus.into());
        for id in 0..usize::from(parts.config.vcpus) {
            vcpus.push(decode::<VcpuStateV1>(&vcpu_slot(id), find(&vcpu_slot(id))?)?);
        }
        let irqchip: IrqchipStateV1 = decode(&slot("irqchip"), find(&slot("irqchip"))?)?;

        parts
            .vcpus
            .with(|fds| fds.iter().zip(&vcpus).try_for_each(|(fd, state)| state.restore(fd, &parts.capabilities)))?;
        parts.console.restore(find(&serial::slot())?)?;
        // Machines of builds before it have none: their guests find one as after a reset, and do not look for it.
        if let Ok(payload) = find(&keyboard::slot()) {
            parts.keyboard.restore(payload)?;
        }
        let blocks = sockets
            .disks
            .into_iter()
            .zip(&parts.config.disks)
            .map(|((disk, wiring), config)| Ok(Block::restore(disk, wiring, find(&block::slot(&config.id))?)?));
        let blocks = blocks.collect::<Result<_, StateFailure>>()?;
        let nets = sockets
            .taps
            .into_iter()
            .zip(&parts.config.networks)
            .map(|((tap, wiring), config)| Ok(Net::restore(tap, wiring, find(&net::slot(&config.id))?)?));
        let nets = nets.collect::<Result<_, StateFailure>>()?;
        let balloon = sockets.balloon.map(|(config, wiring)| -> Result<_, StateFailure> {
            Ok(Balloon::restore(&config, &parts.memory, wiring, find(&balloon::slot())?)?)
        });
        let devices = Devices { blocks, nets, balloon: balloon.transpose()? };
        devices.put_on(&parts.bus).map_err(Box::new)?;
        let _ = self.devices.set(devices);
        irqchip.restore(&parts.vm)?;

        transition.restored = Some(Restored { clock, vcpus });
        *lock(&self.state) = MachineState::Paused;
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use crate::kvm::irq::IrqchipStateV1;
    use crate::vcpu::state::VcpuStateV1;

    /// Two payloads hold the same vCPU, time aside.
    pub(crate) fn same_vcpu(first: &[u8], second: &[u8]) {
        let decode = |bytes| postcard::from_bytes::<VcpuStateV1>(bytes).unwrap();
        decode(first).assert_same(&decode(second));
    }

    /// Two payloads hold the same interrupt controllers, time aside.
    pub(crate) fn same_irqchip(first: &[u8], second: &[u8]) {
        let decode = |bytes| postcard::from_bytes::<IrqchipStateV1>(bytes).unwrap();
        decode(first).assert_same(&decode(second));
    }
}
