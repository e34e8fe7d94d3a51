//! Building a machine: KVM objects, memory, wiring, devices.
//!
//! | constructor | devices | then |
//! | --- | --- | --- |
//! | [`Machine::boot`] | new | a kernel is loaded; [`Machine::resume`] starts it |
//! | [`Machine::incoming`] | wired, made by [`Machine::restore_state`] | memory and disks are filled, state is restored, [`Machine::resume`] |
//!
//! Everything that takes time and does not depend on the guest's last state happens here, before a switchover: threads,
//! memory slots, descriptors, the dirty log, open disks and taps.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use migration::guest::CpuProfile;
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, BootError};
use crate::config::{BalloonConfig, ConfigError, MachineConfig};
use crate::device::bus::{Bus, Overlap};
use crate::device::keyboard::{self, Keyboard};
use crate::device::power::{self, ResetControl};
use crate::device::serial::{self, Console, SerialError};
use crate::device::virtio::Wiring;
use crate::device::virtio::balloon::{self, Balloon};
use crate::device::virtio::block::{self, Block};
use crate::device::virtio::mmio::{MmioTransport, QUEUE_NOTIFY, WINDOW_BYTES};
use crate::device::virtio::net::{self, Net, Tap, TapError};
use crate::device::{BusDevice, DeviceError};
use crate::disk::{DiskError, Purpose, RawDisk};
use crate::kvm::error::ioctl_error;
use crate::kvm::{Host, KvmError, irq};
use crate::memory::{DirtyRings, DirtyTracker, GuestRam, Memory, MemoryError, Slots};
use crate::vcpu::compat::{self, Incompatible};
use crate::vcpu::exit::Exits;
use crate::vcpu::ring_choice::{self, RingRule};
use crate::vcpu::{StopReason, VcpuError, Vcpus, cpuid, msr};
use crate::vm::{Devices, Machine, Parts};

/// Guest-physical address of the first virtio-mmio window.
const VIRTIO_BASE: u64 = 0xd000_0000;

/// Register window of virtio device `index`.
pub fn virtio_window(index: u64) -> Range<u64> {
    let start = VIRTIO_BASE + index * WINDOW_BYTES;
    start..start + WINDOW_BYTES
}

/// A machine cannot be built.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant is the error of the module that it names")]
pub enum BuildError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Incompatible(#[from] Incompatible),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Bus(#[from] Overlap),
    #[error(transparent)]
    Serial(#[from] SerialError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("cannot make an event descriptor: raise the limit of open files (ulimit -n)")]
    Event(#[source] std::io::Error),
}

/// Virtio devices that are wired and not made yet.
pub(crate) struct Sockets {
    pub(crate) disks: Vec<(Arc<RawDisk>, Wiring)>,
    pub(crate) taps: Vec<(Tap, Wiring)>,
    pub(crate) balloon: Option<(BalloonConfig, Wiring)>,
}

impl Machine {
    /// A machine with a kernel in its memory, paused at its first instruction.
    ///
    /// # Errors
    ///
    /// [`BuildError`] with cause and remedy.
    pub fn boot(config: MachineConfig) -> Result<Self, BuildError> {
        Self::boot_by(config, RingRule::default())
    }

    /// The same, where something else says whether it can have rings.
    pub(crate) fn boot_by(config: MachineConfig, rule: RingRule) -> Result<Self, BuildError> {
        config.validate()?;
        let kernel = config.kernel.clone().ok_or(BootError::NoKernel)?;
        let cmdline = config.cmdline.clone() + &boot::virtio_words(config.virtio_devices());
        let (parts, sockets) = build(config, None, rule)?;
        let blocks =
            sockets.disks.into_iter().map(|(disk, wiring)| Block::new(disk, wiring)).collect::<Result<_, _>>()?;
        let nets = sockets.taps.into_iter().map(|(tap, wiring)| Net::new(tap, wiring)).collect::<Result<_, _>>()?;
        let balloon =
            sockets.balloon.map(|(config, wiring)| Balloon::new(&config, &parts.memory, wiring)).transpose()?;
        let devices = Devices { blocks, nets, balloon };
        devices.put_on(&parts.bus)?;
        let config = &parts.config;
        let entry = boot::load(&parts.memory, &kernel, config.initrd.as_deref(), cmdline.trim_start(), config.vcpus)?;
        parts.vcpus.with(|vcpus| boot::enter(vcpus[0], parts.memory.ram(), entry))?;
        Ok(Self::new(parts, devices))
    }

    /// An empty machine with the processor that the guest knows, which waits for memory and state. KVM knows its memory when its
    /// writes begin to be recorded, or else when its state is restored.
    ///
    /// # Errors
    ///
    /// [`BuildError`] with cause and remedy; [`BuildError::Incompatible`] names the CPU feature that is missing here.
    pub fn incoming(config: MachineConfig, profile: &CpuProfile) -> Result<Self, BuildError> {
        config.validate()?;
        let (parts, sockets) = build(config, Some(profile), RingRule::default())?;
        Ok(Self::waiting(parts, sockets))
    }
}

fn build(config: MachineConfig, profile: Option<&CpuProfile>, rule: RingRule) -> Result<(Parts, Sockets), BuildError> {
    let host = Host::open()?;
    let capabilities = *host.capabilities();
    if usize::from(config.vcpus) > capabilities.max_vcpus {
        return Err(ConfigError::TooManyVcpus { wanted: config.vcpus, most: capabilities.max_vcpus }.into());
    }
    let memory = Memory::new(config.memory_mib)?;
    let (ring_entries, tracking) = ring_choice::choose(&config, &host, memory.pages(), rule)?;
    let vm = Arc::new(host.create_vm(ring_entries)?);
    irq::create(&vm)?;
    let slots = Arc::new(Slots::new(Arc::clone(&vm), memory.clone()));
    if profile.is_none() {
        slots.provide()?;
    }

    let fds = (0..config.vcpus)
        .map(|id| vm.create_vcpu(id.into()).map_err(ioctl_error("KVM_CREATE_VCPU")))
        .collect::<Result<Vec<_>, _>>()?;
    let purpose = if profile.is_some() { Purpose::Arrival } else { Purpose::Use };
    let rings = match ring_entries {
        Some(entries) => Some(Arc::new(DirtyRings::new(Arc::clone(&vm), Arc::clone(&slots), &fds, entries)?)),
        None => None,
    };
    let tracker = match &rings {
        Some(rings) => DirtyTracker::with_rings(memory.clone(), Arc::clone(&slots), Arc::clone(rings)),
        None => {
            DirtyTracker::with_log(Arc::clone(&vm), memory.clone(), Arc::clone(&slots), capabilities.manual_dirty_log)
        }
    };
    let profile = set_cpuid(&host, &fds, profile)?;
    let msrs = msr::list(&host, &fds[0])?;

    let bus = Bus::default();
    let stopped = event()?;
    let console = legacy_devices(&config, &vm, &bus)?;
    let exits = Arc::new(Exits::new(bus.clone(), memory.ram().clone(), rings));
    let vcpus = Vcpus::new(fds, &exits, stopped.try_clone().map_err(BuildError::Event)?)?;
    let keyboard = power_devices(&vm, &bus, &vcpus)?;
    let sockets = sockets(&config, purpose, &vm, memory.ram())?;
    let disks = sockets.disks.iter().map(|(disk, _)| Arc::clone(disk)).collect();
    let parts = Parts {
        vcpus,
        config,
        vm,
        capabilities,
        memory,
        slots,
        tracker: Arc::new(tracker),
        tracking,
        msrs,
        profile,
        bus,
        console,
        keyboard,
        disks,
        stopped,
    };
    Ok((parts, sockets))
}

/// Shows every vCPU the wanted profile, if this host can offer it, or what it offers.
fn set_cpuid(host: &Host, fds: &[VcpuFd], wanted: Option<&CpuProfile>) -> Result<CpuProfile, BuildError> {
    let host_khz = fds[0].get_tsc_khz().map_err(ioctl_error("KVM_GET_TSC_KHZ"))?;
    let offer = cpuid::offer(host, host_khz)?;
    let profile = match wanted {
        None => offer,
        Some(wanted) => {
            compat::check(wanted, &offer, host.capabilities().tsc_scaling)?;
            wanted.clone()
        }
    };
    for (id, fd) in (0u8..).zip(fds) {
        let cpuid = cpuid::for_vcpu(&profile, id, fds.len() as u16)?;
        fd.set_cpuid2(&cpuid).map_err(ioctl_error("KVM_SET_CPUID2"))?;
        if host.capabilities().tsc_scaling && profile.tsc_khz != host_khz {
            fd.set_tsc_khz(profile.tsc_khz).map_err(ioctl_error("KVM_SET_TSC_KHZ"))?;
        }
    }
    Ok(profile)
}

fn legacy_devices(config: &MachineConfig, vm: &Arc<VmFd>, bus: &Bus) -> Result<Console, BuildError> {
    let interrupt = irq::Pin::new(Arc::clone(vm), irq::SERIAL_GSI);
    let console = Console::new(&config.serial, Arc::new(interrupt))?;
    bus.insert_ports(serial::PORTS, Arc::new(Mutex::new(console.clone())))?;
    Ok(console)
}

fn power_devices(vm: &Arc<VmFd>, bus: &Bus, vcpus: &Vcpus) -> Result<Keyboard, Overlap> {
    let reset = || {
        let handle = vcpus.stop_handle();
        move || handle.stop(StopReason::Guest("the guest asked for a reset".into()))
    };
    let interrupt = irq::Pin::new(Arc::clone(vm), irq::KEYBOARD_GSI);
    let keyboard = Keyboard::new(Arc::new(interrupt), reset());
    bus.insert_ports(keyboard::PORTS, Arc::new(Mutex::new(keyboard.clone())))?;
    bus.insert_ports(power::RESET_PORTS, Arc::new(Mutex::new(ResetControl::new(reset()))))?;
    Ok(keyboard)
}

fn sockets(config: &MachineConfig, purpose: Purpose, vm: &Arc<VmFd>, ram: &GuestRam) -> Result<Sockets, BuildError> {
    let mut index = 0;
    let mut wire = |queues| {
        let wiring = wire(vm, ram, index, queues);
        index += 1;
        wiring
    };
    let disks = config
        .disks
        .iter()
        .map(|disk| Ok((Arc::new(RawDisk::open(disk, purpose)?), wire(block::QUEUES)?)))
        .collect::<Result<_, BuildError>>()?;
    let taps = config
        .networks
        .iter()
        .map(|network| Ok((Tap::open(network)?, wire(net::QUEUES)?)))
        .collect::<Result<_, BuildError>>()?;
    let balloon = config.balloon.map(|balloon| Ok::<_, BuildError>((balloon, wire(balloon::QUEUES)?))).transpose()?;
    Ok(Sockets { disks, taps, balloon })
}

/// The interrupt of virtio device `index`, and its notifications, registered with KVM: neither passes through a vCPU thread.
fn wire(vm: &Arc<VmFd>, ram: &GuestRam, index: u32, queues: usize) -> Result<Wiring, BuildError> {
    let interrupt = Arc::new(irq::Pin::new(Arc::clone(vm), irq::FIRST_VIRTIO_GSI + index));
    let address = IoEventAddress::Mmio(virtio_window(index.into()).start + QUEUE_NOTIFY);
    let notify = (0..queues as u32)
        .map(|queue| {
            let event = event()?;
            vm.register_ioevent(&event, &address, queue).map_err(ioctl_error("KVM_IOEVENTFD"))?;
            Ok(event)
        })
        .collect::<Result<_, BuildError>>()?;
    Ok(Wiring { ram: ram.clone(), interrupt, notify })
}

fn event() -> Result<EventFd, BuildError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(BuildError::Event)
}

impl Devices {
    /// Makes the registers of all devices visible to the guest: disks, networks, balloon.
    pub(crate) fn put_on(&self, bus: &Bus) -> Result<(), BuildError> {
        let blocks = self.blocks.iter().map(Block::transport);
        let nets = self.nets.iter().map(Net::transport);
        let balloon = self.balloon.iter().map(Balloon::transport);
        for (index, transport) in (0u64..).zip(blocks.chain(nets).chain(balloon)) {
            put(bus, index, transport)?;
        }
        Ok(())
    }
}

fn put(bus: &Bus, index: u64, transport: MmioTransport) -> Result<(), Overlap> {
    let device: Arc<Mutex<dyn BusDevice>> = Arc::new(Mutex::new(transport));
    bus.insert_mmio(virtio_window(index), device)
}
