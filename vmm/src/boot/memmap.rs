//! What a kernel is told of its memory: PVH start info, or the zero page of the Linux boot protocol.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use migration::guest::MemoryRegion;
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, Initrd, KERNEL_START, cmdline};
use crate::memory::GuestRam;

pub(super) const START_INFO: u64 = 0x6000;
pub(super) const ZERO_PAGE: u64 = 0x7000;
const MODULE_LIST: u64 = 0x6080;
const MEMORY_MAP: u64 = 0x6100;

/// End of conventional memory: above lie the MP table and what a PC keeps for firmware and video.
pub(super) const LOW_RAM_END: u64 = 0x9_fc00;

/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const START_VERSION: u32 = 1;

const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// (address, bytes, E820 type), ascending.
pub(super) fn memory_map(regions: &[MemoryRegion]) -> Vec<(u64, u64, u32)> {
    let mut map = vec![(0, LOW_RAM_END, RAM), (LOW_RAM_END, KERNEL_START - LOW_RAM_END, RESERVED)];
    for region in regions {
        let start = region.gpa.max(KERNEL_START);
        map.push((start, region.gpa + region.bytes - start, RAM));
    }
    map
}

pub(super) fn write_start_info(
    ram: &GuestRam,
    map: &[(u64, u64, u32)],
    initrd: Option<&Initrd>,
) -> Result<(), BootError> {
    for (index, &(addr, size, type_)) in (0u64..).zip(map) {
        let entry = hvm_memmap_table_entry { addr, size, type_, reserved: 0 };
        ram.write_obj(entry, GuestAddress(MEMORY_MAP + index * size_of::<hvm_memmap_table_entry>() as u64))?;
    }
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.address, size: initrd.bytes, ..Default::default() };
        ram.write_obj(module, GuestAddress(MODULE_LIST))?;
    }
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { MODULE_LIST } else { 0 },
        cmdline_paddr: cmdline::ADDRESS,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    Ok(ram.write_obj(info, GuestAddress(START_INFO))?)
}

pub(super) fn write_zero_page(
    ram: &GuestRam,
    map: &[(u64, u64, u32)],
    initrd: Option<&Initrd>,
    setup: Option<setup_header>,
    cmdline_bytes: usize,
) -> Result<(), BootError> {
    // Values of a kernel that brings no header (an ELF): boot.rst, "The Real-Mode Kernel Header".
    let plain = setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        kernel_alignment: 0x100_0000,
        ..Default::default()
    };
    let mut header = setup.unwrap_or(plain);
    header.type_of_loader = 0xff;
    header.cmd_line_ptr = cmdline::ADDRESS as u32;
    header.cmdline_size = cmdline_bytes as u32;
    if let Some(initrd) = initrd {
        (header.ramdisk_image, header.ramdisk_size) = (initrd.address as u32, initrd.bytes as u32);
    }
    let mut params = boot_params { hdr: header, e820_entries: map.len() as u8, ..Default::default() };
    for (entry, &(addr, size, type_)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr, size, r#type: type_ };
    }
    Ok(ram.write_obj(params, GuestAddress(ZERO_PAGE))?)
}
