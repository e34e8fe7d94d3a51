//! Which model-specific registers travel.
//!
//! KVM lists what it emulates (`KVM_GET_MSR_INDEX_LIST`, KVM API, 4.3); what a guest cannot use here is left out, and so is
//! what KVM then does not let read. The list is made once, before the guest runs: saving is one ioctl for up to 256
//! registers.

use std::ops::RangeInclusive;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::kvm::clock::MSR_IA32_TSC;
use crate::kvm::error::ioctl_error;
use crate::kvm::{Host, KvmError};

/// The LAPIC timer's deadline; it means something only once the TSC is set.
pub const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;

/// Memory types; emulated by KVM but not in its list.
const MEMORY_TYPES: [RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, MSR_MTRR_DEF_TYPE..=MSR_MTRR_DEF_TYPE];

const LEFT_OUT: [RangeInclusive<u32>; 17] = [
    // Set when the clock starts.
    MSR_IA32_TSC..=MSR_IA32_TSC,
    // kvm-clock under its old numbers. Setting the wall clock makes KVM write to guest memory; a guest sets it each time
    // before it reads it.
    0x11..=0x12,
    0x4b56_4d00..=0x4b56_4d00,
    // Performance counters, Intel and AMD.
    0xc1..=0xc8,
    0x186..=0x18d,
    0x309..=0x30c,
    0x345..=0x345,
    0x38d..=0x390,
    0x3f1..=0x3f2,
    0x4c1..=0x4c8,
    0xc000_0300..=0xc000_0303,
    0xc001_0000..=0xc001_0007,
    0xc001_0200..=0xc001_020b,
    // Nested virtualization, Hyper-V, processor trace.
    0x480..=0x493,
    0x4000_0000..=0x4000_0200,
    0x560..=0x587,
    0xc001_0117..=0xc001_0117,
];

/// The registers of this host that travel, in KVM's order.
///
/// # Errors
///
/// [`KvmError::Ioctl`] if KVM refuses.
pub fn list(host: &Host, vcpu: &VcpuFd) -> Result<Vec<u32>, KvmError> {
    let known = host.kvm().get_msr_index_list().map_err(ioctl_error("KVM_GET_MSR_INDEX_LIST"))?;
    let mut indices: Vec<u32> = known.as_slice().to_vec();
    indices.retain(|index| !LEFT_OUT.iter().any(|range| range.contains(index)));
    for index in MEMORY_TYPES.into_iter().flatten() {
        if !indices.contains(&index) {
            indices.push(index);
        }
    }
    let mut readable = Vec::with_capacity(indices.len());
    let mut rest = indices.as_slice();
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let done = read_some(vcpu, batch)?.len();
        readable.extend_from_slice(&batch[..done]);
        if done < batch.len() {
            tracing::debug!(
                index = format_args!("{:#x}", batch[done]),
                "KVM lists this MSR but does not let it be read"
            );
        }
        rest = &rest[(done + 1).min(batch.len())..];
    }
    Ok(readable)
}

/// Reads registers up to the first that KVM refuses.
fn read_some(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let entries: Vec<_> = indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::Capability("room for that many MSRs"))?;
    let done = vcpu.get_msrs(&mut msrs).map_err(ioctl_error("KVM_GET_MSRS"))?;
    Ok(msrs.as_slice()[..done.min(indices.len())].iter().map(|entry| (entry.index, entry.data)).collect())
}

/// Reads all of `indices`.
///
/// # Errors
///
/// [`KvmError`] if KVM refuses one of them now.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    for batch in indices.chunks(kvm_bindings::KVM_MAX_MSR_ENTRIES) {
        let mut rest = batch;
        while !rest.is_empty() {
            let read = read_some(vcpu, rest)?;
            let skip = (read.len() + 1).min(rest.len());
            values.extend(read);
            rest = &rest[skip..];
        }
    }
    Ok(values)
}

/// Writes `values`. Those that KVM refuses are passed over if they have the wanted value already, or are zero and unknown
/// here; the others are returned.
///
/// # Errors
///
/// [`KvmError::Ioctl`] if the ioctl itself fails.
pub fn write(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut refused = Vec::new();
    for batch in values.chunks(kvm_bindings::KVM_MAX_MSR_ENTRIES) {
        let mut rest = batch;
        while !rest.is_empty() {
            let entries: Vec<_> =
                rest.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
            let msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::Capability("room for that many MSRs"))?;
            let done = vcpu.set_msrs(&msrs).map_err(ioctl_error("KVM_SET_MSRS"))?.min(rest.len());
            if let Some(&(index, value)) = rest.get(done) {
                let here = read_some(vcpu, &[index])?.first().map_or(0, |&(_, data)| data);
                if here != value {
                    refused.push((index, value));
                }
            }
            rest = &rest[(done + 1).min(rest.len())..];
        }
    }
    Ok(refused)
}

/// What firmware would have set before it starts an operating system: memory is write-back, string instructions are fast.
pub const AT_BOOT: [(u32, u64); 2] = [(MSR_MTRR_DEF_TYPE, 1 << 11 | 6), (MSR_IA32_MISC_ENABLE, 1)];
