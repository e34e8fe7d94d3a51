//! What a vCPU's exits to the VMM mean (KVM API, 5).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::stop::StopReason;
use crate::device::bus::Bus;
use crate::kvm::dirty_ring::EXIT_RING_FULL;
use crate::memory::{DirtyRings, GuestRam};

/// `int3`, one byte.
const BREAKPOINT: u8 = 0xcc;
/// Its exception (Intel SDM vol. 3A, 6.3.1).
const BREAKPOINT_VECTOR: u8 = 3;

/// What a vCPU thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Enters the guest again.
    Continue,
    /// Looks whether it is to park.
    Interrupted,
}

/// Serves the exits of a machine's vCPUs.
#[derive(Debug)]
pub struct Exits {
    bus: Bus,
    ram: GuestRam,
    rings: Option<Arc<DirtyRings>>,
    ring_full: AtomicU64,
}

impl Exits {
    /// Serves registers on `bus`, and `rings` that are full.
    pub fn new(bus: Bus, ram: GuestRam, rings: Option<Arc<DirtyRings>>) -> Self {
        Self { bus, ram, rings, ring_full: AtomicU64::new(0) }
    }

    /// How often a vCPU had to wait for its full ring to be emptied.
    pub fn ring_full(&self) -> u64 {
        self.ring_full.load(Ordering::Relaxed)
    }

    /// Enters the guest until its next exit and serves it. `stop` is called if the machine cannot go on.
    pub fn run_once(&self, fd: &mut VcpuFd, stop: impl FnOnce(StopReason)) -> Next {
        let run = std::ptr::from_mut(fd.get_kvm_run()).cast_const();
        match fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => self.bus.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => self.bus.mmio_write(address, data),
            // A string instruction hands over many accesses of `width` bytes at once.
            Ok(VcpuExit::IoIn(port, data)) => {
                data.chunks_mut(port_width(run)).for_each(|access| self.bus.port_read(port, access));
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                data.chunks(port_width(run)).for_each(|access| self.bus.port_write(port, access));
            }
            Ok(VcpuExit::Shutdown) => {
                stop(StopReason::Guest("the guest shut its processor down (triple fault): a reset, or a crash".into()));
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => stop(system_event(kind)),
            Ok(VcpuExit::InternalError) => {
                if !self.step_over_breakpoint(fd, run) {
                    stop(internal_error(fd, run));
                }
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                stop(StopReason::Failure(format!(
                    "the processor refused to enter the guest: hardware reason {reason:#x} on host CPU {cpu}, see the host's kernel log"
                )));
            }
            // With interrupt controllers in the kernel a halted vCPU waits there; this is a spurious answer.
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_)) => {}
            Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                stop(StopReason::Failure(format!(
                    "guest memory at {gpa:#x} cannot be used: the host is out of memory or its memory is broken, see its kernel log"
                )));
            }
            Ok(VcpuExit::Unsupported(EXIT_RING_FULL)) => {
                self.ring_full.fetch_add(1, Ordering::Relaxed);
                if let Some(Err(error)) = self.rings.as_ref().map(|rings| rings.relieve()) {
                    stop(StopReason::Failure(format!("the dirty rings are full and cannot be emptied: {error}")));
                }
            }
            Ok(other) => {
                let text = format!("KVM left the guest for a reason that was not asked for: {other:?}");
                stop(StopReason::Failure(text));
            }
            Err(error) if error.errno() == libc::EINTR => return Next::Interrupted,
            // A vCPU that waits for its startup IPI was woken for another reason.
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) => stop(StopReason::Failure(format!("KVM_RUN failed: {error}; see the host's kernel log"))),
        }
        Next::Continue
    }

    /// Some KVM builds cannot emulate `int3` in kernel mode and give it back here. What the processor would have done is
    /// well defined: raise #BP with RIP behind the instruction.
    fn step_over_breakpoint(&self, fd: &VcpuFd, run: *const kvm_run) -> bool {
        if suberror(run) != KVM_INTERNAL_ERROR_EMULATION {
            return false;
        }
        let Ok(mut regs) = fd.get_regs() else { return false };
        if self.code_byte(fd, regs.rip) != Some(BREAKPOINT) {
            return false;
        }
        let Ok(mut events) = fd.get_vcpu_events() else { return false };
        regs.rip = regs.rip.wrapping_add(1);
        events.exception.injected = 1;
        events.exception.nr = BREAKPOINT_VECTOR;
        events.exception.has_error_code = 0;
        fd.set_regs(&regs).and_then(|()| fd.set_vcpu_events(&events)).is_ok()
    }

    fn code_byte(&self, fd: &VcpuFd, rip: u64) -> Option<u8> {
        let translation = fd.translate_gva(rip).ok().filter(|translation| translation.valid != 0)?;
        self.ram.read_obj(GuestAddress(translation.physical_address)).ok()
    }
}

/// Bytes of one access of the port I/O exit that has just happened.
fn port_width(run: *const kvm_run) -> usize {
    // SAFETY: called while the exit is KVM_EXIT_IO, of the thread that owns the vCPU; `run` is its live mapping.
    let width = unsafe { (*run).__bindgen_anon_1.io.size };
    usize::from(width).max(1)
}

fn suberror(run: *const kvm_run) -> u32 {
    // SAFETY: called while the exit is KVM_EXIT_INTERNAL_ERROR, of the thread that owns the vCPU.
    unsafe { (*run).__bindgen_anon_1.internal.suberror }
}

fn system_event(kind: u32) -> StopReason {
    match kind {
        KVM_SYSTEM_EVENT_SHUTDOWN => StopReason::Guest("the guest turned the machine off".into()),
        KVM_SYSTEM_EVENT_RESET => StopReason::Guest("the guest asked for a reset".into()),
        KVM_SYSTEM_EVENT_CRASH => StopReason::Failure("the guest reported that it has crashed".into()),
        kind => StopReason::Failure(format!("the guest raised system event {kind}, which is not supported")),
    }
}

fn internal_error(fd: &VcpuFd, run: *const kvm_run) -> StopReason {
    let rip = fd.get_regs().map_or_else(|_| "an unknown address".to_owned(), |regs| format!("{:#x}", regs.rip));
    StopReason::Failure(match suberror(run) {
        KVM_INTERNAL_ERROR_EMULATION => {
            format!(
                "KVM cannot emulate the guest's instruction at {rip}: the guest uses something that this host's KVM lacks"
            )
        }
        code => format!("KVM failed inside (sub-error {code}) with the guest at {rip}: see the host's kernel log"),
    })
}
