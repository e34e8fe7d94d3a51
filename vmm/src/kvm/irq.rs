//! The in-kernel interrupt controllers (two PICs, IOAPIC, a LAPIC in each vCPU) and the PIT.
//!
//! KVM's default routing is kept: GSI 0..15 reach both PIC and IOAPIC, GSI 16..23 the IOAPIC only (KVM API, 4.52).

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, kvm_irqchip,
    kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::KvmError;
use super::error::ioctl_error;
use crate::device::Line;

/// GSI of the keyboard, as on every PC.
pub const KEYBOARD_GSI: u32 = 1;

/// GSI of the first serial port, as on every PC.
pub const SERIAL_GSI: u32 = 4;

/// GSI of the first virtio device; the others follow.
pub const FIRST_VIRTIO_GSI: u32 = 5;

/// The IOAPIC's last pin.
pub const LAST_GSI: u32 = 23;
/// How many virtio devices find a pin on the IOAPIC.
pub const MAX_VIRTIO_DEVICES: usize = (LAST_GSI - FIRST_VIRTIO_GSI + 1) as usize;

/// Three pages for KVM's own use on processors without unrestricted guest mode (KVM API, 4.30), in the device hole.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Creates the controllers; must come before the first vCPU.
///
/// # Errors
///
/// [`KvmError::Ioctl`] if KVM refuses.
pub fn create(vm: &VmFd) -> Result<(), KvmError> {
    vm.set_tss_address(TSS_ADDRESS).map_err(ioctl_error("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(ioctl_error("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(ioctl_error("KVM_CREATE_PIT2"))
}

/// A pin of the interrupt controllers, pulsed by whoever has the interrupt to deliver.
///
/// Not an irqfd: KVM delivers those in the context of the writer only if they are routed as MSI. For a pin of the IOAPIC it
/// asks a worker thread of the kernel, which waits for its turn like any other. On a busy host, below control groups of
/// higher weight, interrupts were 10 to 50 ms late.
pub struct Pin {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl Pin {
    /// The pin of `gsi`.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Self {
        Self { vm, gsi }
    }
}

impl Line for Pin {
    fn pulse(&self) -> io::Result<()> {
        self.vm.set_irq_line(self.gsi, true)?;
        Ok(self.vm.set_irq_line(self.gsi, false)?)
    }
}

/// Saved state, version 1.
#[derive(Serialize, Deserialize)]
pub struct IrqchipStateV1 {
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    pit: kvm_pit_state2,
}

impl IrqchipStateV1 {
    /// Reads the controllers. The devices are paused, so that no line changes any more.
    ///
    /// # Errors
    ///
    /// [`KvmError::Ioctl`] if KVM refuses.
    pub fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(ioctl_error("KVM_GET_IRQCHIP")).map(|()| chip)
        };
        Ok(Self {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit: vm.get_pit2().map_err(ioctl_error("KVM_GET_PIT2"))?,
        })
    }

    /// Writes the controllers.
    ///
    /// # Errors
    ///
    /// [`KvmError::Ioctl`] if KVM refuses.
    pub fn restore(self, vm: &VmFd) -> Result<(), KvmError> {
        let chips = [
            (self.pic_master, KVM_IRQCHIP_PIC_MASTER),
            (self.pic_slave, KVM_IRQCHIP_PIC_SLAVE),
            (self.ioapic, KVM_IRQCHIP_IOAPIC),
        ];
        for (mut chip, chip_id) in chips {
            chip.chip_id = chip_id;
            vm.set_irqchip(&chip).map_err(ioctl_error("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&self.pit).map_err(ioctl_error("KVM_SET_PIT2"))
    }
}

#[cfg(test)]
impl IrqchipStateV1 {
    /// All that does not change with time is equal.
    pub(crate) fn assert_same(&self, other: &Self) {
        let chip = |chip: &kvm_irqchip| {
            // SAFETY: `dummy` covers every other member of the union.
            unsafe { chip.chip.dummy }
        };
        assert_eq!(chip(&self.pic_master), chip(&other.pic_master));
        assert_eq!(chip(&self.pic_slave), chip(&other.pic_slave));
        assert_eq!(chip(&self.ioapic), chip(&other.ioapic));
        let modes = |pit: &kvm_pit_state2| pit.channels.map(|channel| (channel.count, channel.mode, channel.gate));
        assert_eq!(modes(&self.pit), modes(&other.pit));
    }
}
