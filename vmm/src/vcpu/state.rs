//! The state of one vCPU, and the order in which it is restored.
//!
//! 1. CPUID, when the vCPU is made: KVM checks control registers, XCR0 and MSRs against it.
//! 2. Special registers: they carry EFER, CR4 and the APIC base, on which XCR0, MSRs and the LAPIC's layout depend.
//! 3. General registers, XCR0, then the extended state, whose components XCR0 enables; debug registers.
//! 4. LAPIC, whose timer mode decides what the TSC deadline means; then the MSRs, without TSC and deadline.
//! 5. Pending events, which would be overwritten by 2; then the run state (MP state), which the LAPIC's reset would change.
//! 6. Only when the machine runs: TSC, then the deadline of the LAPIC timer, which is compared with the TSC; then KVM is
//!    told that the guest was stopped, so that its watchdogs do not bark.

use kvm_bindings::{
    Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::VcpuError;
use super::msr::{self, MSR_IA32_TSC_DEADLINE};
use crate::kvm::error::ioctl_error;
use crate::kvm::{Capabilities, KvmError, clock};

/// Bytes of `struct kvm_xsave` without the part that `KVM_GET_XSAVE2` adds.
const XSAVE_BYTES: usize = size_of::<kvm_xsave>();

const _: () = assert!(XSAVE_BYTES == 4096);

/// Saved state, version 1. The structures are the kernel's, which only ever grow at their ends.
#[derive(Serialize, Deserialize)]
pub struct VcpuStateV1 {
    sregs: kvm_sregs,
    regs: kvm_regs,
    xcrs: kvm_xcrs,
    /// 1024 words, and more with state components beyond 4 KiB.
    xsave: Vec<u32>,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// (index, value).
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    tsc_offset: Option<u64>,
}

impl VcpuStateV1 {
    /// Reads a vCPU that is parked. KVM has completed its last exit by then.
    ///
    /// # Errors
    ///
    /// [`KvmError::Ioctl`] if KVM refuses.
    pub fn save(vcpu: &VcpuFd, msrs: &[u32], capabilities: &Capabilities) -> Result<Self, KvmError> {
        // MP state first: reading it makes KVM take in an INIT or SIPI that is on its way (KVM API, 4.38).
        let mp_state = vcpu.get_mp_state().map_err(ioctl_error("KVM_GET_MP_STATE"))?;
        Ok(Self {
            sregs: vcpu.get_sregs().map_err(ioctl_error("KVM_GET_SREGS"))?,
            regs: vcpu.get_regs().map_err(ioctl_error("KVM_GET_REGS"))?,
            xcrs: vcpu.get_xcrs().map_err(ioctl_error("KVM_GET_XCRS"))?,
            xsave: read_xsave(vcpu, capabilities.xsave_bytes)?,
            debug_regs: vcpu.get_debug_regs().map_err(ioctl_error("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(ioctl_error("KVM_GET_LAPIC"))?,
            msrs: msr::read(vcpu, msrs)?,
            // KVM marks which fields hold something; the same marks tell it what to set.
            events: vcpu.get_vcpu_events().map_err(ioctl_error("KVM_GET_VCPU_EVENTS"))?,
            mp_state,
            tsc_offset: clock::tsc_offset(vcpu),
        })
    }

    /// Writes all but the clocks to a vCPU that has not run yet.
    ///
    /// # Errors
    ///
    /// [`VcpuError`] if KVM refuses, or the extended state is larger than this host's.
    pub fn restore(&self, vcpu: &VcpuFd, capabilities: &Capabilities) -> Result<(), VcpuError> {
        vcpu.set_sregs(&self.sregs).map_err(ioctl_error("KVM_SET_SREGS"))?;
        vcpu.set_regs(&self.regs).map_err(ioctl_error("KVM_SET_REGS"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(ioctl_error("KVM_SET_XCRS"))?;
        write_xsave(vcpu, &self.xsave, capabilities.xsave_bytes)?;
        vcpu.set_debug_regs(&self.debug_regs).map_err(ioctl_error("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(ioctl_error("KVM_SET_LAPIC"))?;
        let now: Vec<_> = self.msrs.iter().copied().filter(|&(index, _)| index != MSR_IA32_TSC_DEADLINE).collect();
        for (index, value) in msr::write(vcpu, &now)? {
            tracing::warn!(
                index = format_args!("{index:#x}"),
                value = format_args!("{value:#x}"),
                "KVM does not let this MSR be set: the guest keeps this host's value"
            );
        }
        vcpu.set_vcpu_events(&self.events).map_err(ioctl_error("KVM_SET_VCPU_EVENTS"))?;
        vcpu.set_mp_state(self.mp_state).map_err(ioctl_error("KVM_SET_MP_STATE"))?;
        Ok(())
    }

    /// What [`clock::start_tsc`] needs of this vCPU.
    pub fn tsc_offset(&self) -> Option<u64> {
        self.tsc_offset
    }

    /// Arms the LAPIC timer, once the TSC goes on.
    ///
    /// # Errors
    ///
    /// [`KvmError::Ioctl`] if KVM refuses.
    pub fn start_timer(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let deadline = self.msrs.iter().copied().find(|&(index, value)| index == MSR_IA32_TSC_DEADLINE && value != 0);
        match deadline {
            Some(deadline) => msr::write(vcpu, &[deadline]).map(drop),
            None => Ok(()),
        }
    }
}

/// Tells the guest's kvm-clock that it was stopped (KVM API, 4.79). A guest without kvm-clock gets EINVAL, which is no
/// error.
pub fn notify_stopped(vcpu: &VcpuFd, capabilities: &Capabilities) {
    if capabilities.kvmclock_ctrl {
        let _ = vcpu.kvmclock_ctrl();
    }
}

fn read_xsave(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u32>, KvmError> {
    if bytes <= XSAVE_BYTES {
        let xsave = vcpu.get_xsave().map_err(ioctl_error("KVM_GET_XSAVE"))?;
        return Ok(xsave.region.to_vec());
    }
    let extra = (bytes - XSAVE_BYTES).div_ceil(4);
    let mut xsave = Xsave::new(extra).map_err(|_| KvmError::Capability("a sane size of the extended state"))?;
    // SAFETY: the structure has room for the number of bytes that KVM_CAP_XSAVE2 tells.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(ioctl_error("KVM_GET_XSAVE2"))?;
    let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(xsave.as_slice());
    Ok(words)
}

fn write_xsave(vcpu: &VcpuFd, words: &[u32], bytes: usize) -> Result<(), VcpuError> {
    let room = bytes.max(XSAVE_BYTES) / 4;
    // A host with more components writes more; what lies beyond this host's must be unused.
    let fits = words.len() >= XSAVE_BYTES / 4 && words.iter().skip(room).all(|&word| word == 0);
    if !fits {
        return Err(VcpuError::ExtendedState { found: words.len() * 4, room: room * 4 });
    }
    let mut xsave = Xsave::new(room - XSAVE_BYTES / 4).map_err(|_| KvmError::Capability("a sane extended state"))?;
    let (legacy, extra) = words[..words.len().min(room)].split_at(XSAVE_BYTES / 4);
    xsave.as_mut_slice()[..extra.len()].copy_from_slice(extra);
    // SAFETY: only the length of the flexible array must not change, and `region` is not that length.
    unsafe { xsave.as_mut_fam_struct() }.xsave.region.copy_from_slice(legacy);
    // SAFETY: the structure holds as many bytes as KVM reads on this host.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(ioctl_error("KVM_SET_XSAVE"))?;
    Ok(())
}

#[cfg(test)]
impl VcpuStateV1 {
    /// All that does not change with time is equal.
    pub(crate) fn assert_same(&self, other: &Self) {
        /// Bytes of the LAPIC page that count: not the current count of its timer.
        fn registers(lapic: &kvm_lapic_state) -> Vec<i8> {
            let mut registers = lapic.regs.to_vec();
            registers[0x390..0x394].fill(0);
            registers
        }
        assert_eq!(self.regs, other.regs);
        assert_eq!(self.sregs, other.sregs);
        assert_eq!(self.xcrs, other.xcrs);
        assert_eq!(self.xsave, other.xsave);
        assert_eq!(self.debug_regs, other.debug_regs);
        assert_eq!(registers(&self.lapic), registers(&other.lapic));
        assert_eq!(self.msrs, other.msrs);
        assert_eq!(self.events, other.events);
        assert_eq!(self.mp_state, other.mp_state);
        assert_eq!(self.regs.rbx, 0x1234_5678);
    }
}
