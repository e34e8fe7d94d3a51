//! The boot vCPU's registers.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::memmap::{START_INFO, ZERO_PAGE};
use super::{BootError, Entry};
use crate::kvm::error::ioctl_error;
use crate::memory::GuestRam;
use crate::vcpu::msr;

const DESCRIPTORS: u64 = 0x500;
const PAGE_TABLES: u64 = 0x9000;
const STACK: u64 = 0x8ff0;

/// Control register and EFER bits (Intel SDM vol. 3A, 2.5 and 2.2.1).
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Present, writable, user: also valid for a guest that goes on in user mode.
const TABLE: u64 = 0b111;
const LARGE_PAGE: u64 = 1 << 7;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Puts the boot vCPU at the kernel's entry.
///
/// # Errors
///
/// [`BootError`] if KVM or guest memory refuses.
pub fn enter(vcpu: &VcpuFd, ram: &GuestRam, entry: Entry) -> Result<(), BootError> {
    let mut sregs = vcpu.get_sregs().map_err(ioctl_error("KVM_GET_SREGS"))?;
    let mut regs = kvm_regs { rflags: 2, ..Default::default() };
    match entry {
        Entry::Pvh { entry } => {
            segments(&mut sregs, ram, false)?;
            sregs.cr0 = CR0_PE | CR0_ET;
            (regs.rip, regs.rbx) = (entry, START_INFO);
        }
        Entry::Linux { entry } => {
            segments(&mut sregs, ram, true)?;
            identity_map(ram)?;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            (regs.rip, regs.rsi, regs.rsp) = (entry, ZERO_PAGE, STACK);
        }
    }
    vcpu.set_sregs(&sregs).map_err(ioctl_error("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(ioctl_error("KVM_SET_REGS"))?;
    for (index, value) in msr::write(vcpu, &msr::AT_BOOT)? {
        tracing::debug!(index = format_args!("{index:#x}"), value, "this KVM does not let a boot MSR be set");
    }
    virtual_wire(vcpu)
}

fn segments(sregs: &mut kvm_sregs, ram: &GuestRam, long: bool) -> Result<(), BootError> {
    let flat = |selector, type_, db: bool, l: bool| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: db.into(),
        s: 1,
        l: l.into(),
        g: 1,
        ..Default::default()
    };
    let data = flat(DATA_SELECTOR, 3, true, false);
    sregs.cs = flat(CODE_SELECTOR, 0xb, !long, long);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: TASK_SELECTOR, type_: 0xb, present: 1, ..Default::default() };
    let code = if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
    let table: [u64; 5] = [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
    for (offset, descriptor) in (DESCRIPTORS..).step_by(8).zip(table) {
        ram.write_obj(descriptor, GuestAddress(offset))?;
    }
    sregs.gdt = kvm_dtable { base: DESCRIPTORS, limit: 8 * 5 - 1, ..Default::default() };
    sregs.idt = kvm_dtable { base: 0, limit: 0, ..Default::default() };
    Ok(())
}

/// Maps the first 4 GiB with pages of 2 MiB.
fn identity_map(ram: &GuestRam) -> Result<(), BootError> {
    let directories = PAGE_TABLES + 0x2000;
    ram.write_obj((PAGE_TABLES + 0x1000) | TABLE, GuestAddress(PAGE_TABLES))?;
    for gib in 0..4 {
        let directory = directories + gib * 0x1000;
        ram.write_obj(directory | TABLE, GuestAddress(PAGE_TABLES + 0x1000 + gib * 8))?;
        for index in 0..512 {
            let page = (gib << 30) + (index << 21);
            ram.write_obj(page | LARGE_PAGE | TABLE, GuestAddress(directory + index * 8))?;
        }
    }
    Ok(())
}

/// Until the kernel programs the IOAPIC, the PICs reach the boot vCPU through LINT0 (MP specification, 3.6.2.2).
fn virtual_wire(vcpu: &VcpuFd) -> Result<(), BootError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXTERNAL: u32 = 7 << 8;
    const NMI: u32 = 4 << 8;
    let mut lapic = vcpu.get_lapic().map_err(ioctl_error("KVM_GET_LAPIC"))?;
    for (register, mode) in [(LVT_LINT0, EXTERNAL), (LVT_LINT1, NMI)] {
        for (byte, value) in lapic.regs[register..register + 4].iter_mut().zip(mode.to_le_bytes()) {
            *byte = value.cast_signed();
        }
    }
    vcpu.set_lapic(&lapic).map_err(ioctl_error("KVM_SET_LAPIC"))?;
    Ok(())
}
