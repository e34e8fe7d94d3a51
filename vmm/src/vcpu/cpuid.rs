//! What a guest learns of its processor by CPUID (Intel SDM vol. 2A, AMD APM vol. 3 appendix E).
//!
//! A new machine is shown what KVM supports on this host, less what could not move to another host: performance counters,
//! nested virtualization, enclaves, processor trace. That list, the profile, stays with the machine for its life: a
//! destination shows the same one. Only what differs from vCPU to vCPU is filled in for each.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use migration::guest::CpuProfile;

use crate::kvm::error::ioctl_error;
use crate::kvm::{Host, KvmError};

/// Leaf of the hypervisor's interface (KVM: `Documentation/virt/kvm/x86/cpuid.rst`).
const KVM_LEAF: u32 = 0x4000_0000;
/// Paravirtual features.
const KVM_FEATURES: u32 = 0x4000_0001;
/// TSC and APIC frequency in kHz, as VMware defined it and Linux and others read it.
const FREQUENCY_LEAF: u32 = 0x4000_0010;
/// KVM's LAPIC timer counts nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// kvm-clock (old and new MSRs, stable), no I/O delay, steal time, PV EOI, PV TLB flush. Left out: what needs hypercalls, and
/// asynchronous page faults, which are of no use where guest memory is not swapped.
const PARAVIRTUAL: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 24;

/// Functions whose sub-leaves are numbered by ECX.
const INDEXED: [u32; 17] =
    [4, 7, 0xb, 0xd, 0xf, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1d, 0x1e, 0x1f, 0x20, 0x23, 0x24, 0x8000_001d];

/// The profile that this host offers.
///
/// # Errors
///
/// [`KvmError::Ioctl`] if KVM refuses.
pub fn offer(host: &Host, tsc_khz: u32) -> Result<CpuProfile, KvmError> {
    let supported =
        host.kvm().get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(ioctl_error("KVM_GET_SUPPORTED_CPUID"))?;
    let mut entries: Vec<kvm_cpuid_entry2> = supported.as_slice().to_vec();
    let xcr0 = entries.iter().find(|entry| (entry.function, entry.index) == (0xd, 0)).map_or(0, |entry| entry.eax);
    for entry in &mut entries {
        restrict(entry, xcr0);
        if entry.function == 1 && host.capabilities().tsc_deadline {
            entry.ecx |= 1 << 24;
        }
    }
    if let Some(leaf) = entries.iter_mut().find(|entry| entry.function == KVM_LEAF) {
        leaf.eax = leaf.eax.max(FREQUENCY_LEAF);
    }
    entries.retain(|entry| entry.function != FREQUENCY_LEAF);
    entries.push(kvm_cpuid_entry2 {
        function: FREQUENCY_LEAF,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..kvm_cpuid_entry2::default()
    });
    let leaves = entries.iter().map(|e| [e.function, e.index, e.eax, e.ebx, e.ecx, e.edx]).collect();
    Ok(CpuProfile { leaves, tsc_khz })
}

/// Takes away what does not travel.
fn restrict(entry: &mut kvm_cpuid_entry2, xcr0: u32) {
    const TILES: u32 = 0b11 << 17;
    match (entry.function, entry.index) {
        // DTES64, MONITOR, VMX, PDCM; the hypervisor bit is set for every guest.
        (1, _) => entry.ecx = entry.ecx & !(1 << 2 | 1 << 3 | 1 << 5 | 1 << 15) | 1 << 31,
        (7, 0) => {
            entry.ebx &= !(1 << 2 | 1 << 25); // SGX, processor trace
            entry.ecx &= !(1 << 29 | 1 << 30); // ENQCMD, SGX launch control
            if xcr0 & TILES != TILES {
                entry.edx &= !(1 << 22 | 1 << 24 | 1 << 25); // AMX without its state
            }
        }
        // Performance counters, SGX, processor trace, nested SVM, AMD's performance counters.
        (0xa | 0x12 | 0x14 | 0x8000_000a | 0x8000_0022, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        (0x8000_0001, _) => entry.ecx &= !(1 << 2 | 1 << 23 | 1 << 24 | 1 << 28), // SVM, performance counters
        (KVM_FEATURES, _) => entry.eax &= PARAVIRTUAL,
        _ => {}
    }
}

/// The leaves of vCPU `id` of `count`.
///
/// # Errors
///
/// [`KvmError::Capability`] if the profile has more leaves than KVM takes.
pub fn for_vcpu(profile: &CpuProfile, id: u8, count: u16) -> Result<CpuId, KvmError> {
    let entries: Vec<_> = profile
        .leaves
        .iter()
        .map(|&[function, index, eax, ebx, ecx, edx]| {
            let flags = if INDEXED.contains(&function) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
            let mut entry = kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] };
            place(&mut entry, id, count);
            entry
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| KvmError::Capability("room for that many CPUID leaves"))
}

/// Topology: one package with `count` cores of one thread each. The APIC id is the vCPU's number.
fn place(entry: &mut kvm_cpuid_entry2, id: u8, count: u16) {
    let (apic_id, cores) = (u32::from(id), u32::from(count));
    let core_bits = cores.next_power_of_two().trailing_zeros();
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ebx = entry.ebx & 0x0000_ffff | cores.next_power_of_two().min(255) << 16 | apic_id << 24;
            entry.edx = entry.edx & !(1 << 28) | u32::from(cores > 1) << 28;
        }
        // Caches: the first two levels belong to a core, the third to the package.
        (4 | 0x8000_001d, _) if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { (1 << core_bits) - 1 } else { 0 };
            let ids = if entry.function == 4 { (1 << core_bits) - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | ids << 26;
        }
        // x2APIC topology: threads of a core, cores of the package, end.
        (0xb | 0x1f, index) => {
            (entry.eax, entry.ebx, entry.ecx) = match index {
                0 => (0, 1, 1 << 8),
                1 => (core_bits, cores, 1 | 2 << 8),
                _ => (0, 0, index & 0xff),
            };
            entry.edx = apic_id;
        }
        (0x8000_0008, _) => entry.ecx = entry.ecx & !0xf0ff | (cores - 1) & 0xff | core_bits << 12,
        (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id & 0xff, 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::capability::host_for_test;

    fn register(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap()
    }

    #[test]
    fn each_vcpu_finds_itself_in_one_package() {
        let leaves = vec![
            [1, 0, 0, 0x1234_0800, 0, 0],
            [4, 0, 0x1c00_4121, 0, 0, 0],
            [4, 3, 0x1c03_c163, 0, 0, 0],
            [0xb, 0, 9, 9, 9, 9],
            [0xb, 1, 9, 9, 9, 9],
            [0x8000_0008, 0, 0x3030, 0, 0x7007, 0],
        ];
        let cpuid = for_vcpu(&CpuProfile { leaves, tsc_khz: 1 }, 2, 3).unwrap();
        assert_eq!(register(&cpuid, 1, 0).ebx, 0x0204_0800);
        assert_eq!(register(&cpuid, 1, 0).edx, 1 << 28);
        assert_eq!(register(&cpuid, 4, 0).eax, 0x0c00_0121);
        assert_eq!(register(&cpuid, 4, 3).eax, 0x0c00_c163);
        assert_eq!(register(&cpuid, 0xb, 1).eax, 2);
        assert_eq!((register(&cpuid, 0xb, 1).ebx, register(&cpuid, 0xb, 1).edx), (3, 2));
        assert_eq!(register(&cpuid, 0x8000_0008, 0).ecx, 0x2002);
        assert_eq!(register(&cpuid, 0xb, 0).flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
    }

    #[test]
    fn kvm_accepts_what_this_host_offers() {
        let Some(host) = host_for_test("kvm_accepts_what_this_host_offers") else { return };
        let vm = host.create_vm(None).unwrap();
        crate::kvm::irq::create(&vm).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let profile = offer(&host, vcpu.get_tsc_khz().unwrap()).unwrap();
        vcpu.set_cpuid2(&for_vcpu(&profile, 0, 1).unwrap()).unwrap();
        assert!(profile.leaves.iter().any(|leaf| leaf[0] == FREQUENCY_LEAF && leaf[2] == profile.tsc_khz));
    }
}
