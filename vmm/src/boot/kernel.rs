//! Loading the kernel image itself.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::loader::bootparam::{XLF_KERNEL_64, setup_header};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::GuestAddress;

use super::{BootError, Entry, KERNEL_START, open};
use crate::memory::GuestRam;

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// `HdrS`, at 0x202 of a bzImage.
const SETUP_MAGIC: [u8; 4] = *b"HdrS";
const SETUP_MAGIC_OFFSET: u64 = 0x202;
/// The 64-bit entry point of a bzImage, from its load address (boot.rst, "64-bit boot protocol").
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// Highest address of an initial RAM disk for kernels that do not say.
const INITRD_LIMIT: u64 = 0x8000_0000;

/// A kernel in guest memory.
pub(super) struct Loaded {
    pub entry: Entry,
    /// One past the last byte that it uses before it manages memory itself.
    pub end: u64,
    /// End of what it can reach as initial RAM disk.
    pub initrd_limit: u64,
    /// A bzImage's own header.
    pub setup: Option<setup_header>,
}

pub(super) fn load(ram: &GuestRam, path: &Path, limit: u64) -> Result<Loaded, BootError> {
    let mut file = open("kernel", path)?;
    let magic = |offset| {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, offset).map(|()| bytes).unwrap_or_default()
    };
    if magic(0) == ELF_MAGIC {
        check_segments(&file, path, limit)?;
        load_elf(ram, &mut file, path, limit)
    } else if magic(SETUP_MAGIC_OFFSET) == SETUP_MAGIC {
        load_bzimage(ram, &mut file, path, limit)
    } else {
        Err(BootError::NotAKernel(path.to_owned()))
    }
}

fn unusable(path: &Path, detail: impl Into<String>) -> BootError {
    BootError::Unusable { path: path.to_owned(), detail: detail.into() }
}

fn check_range(path: &Path, start: u64, bytes: u64, limit: u64) -> Result<u64, BootError> {
    let end = start.saturating_add(bytes);
    if start >= KERNEL_START && end <= limit {
        Ok(end)
    } else {
        Err(BootError::OutsideRam { path: path.to_owned(), start, end, limit })
    }
}

/// Looks at the program headers (ELF-64 object file format, 5) before a byte is loaded.
fn check_segments(file: &File, path: &Path, limit: u64) -> Result<(), BootError> {
    const PT_LOAD: u32 = 1;
    const MACHINE_X86_64: u16 = 62;
    let read = |offset: u64, buffer: &mut [u8]| {
        file.read_exact_at(buffer, offset).map_err(|error| unusable(path, format!("its header is cut short ({error})")))
    };
    let mut header = [0; 64];
    read(0, &mut header)?;
    let machine = u16::from_le_bytes([header[18], header[19]]);
    if (header[4], header[5], machine) != (2, 1, MACHINE_X86_64) {
        return Err(unusable(path, format!("it is not for x86-64 (machine {machine}, class {})", header[4])));
    }
    let (offset, count) = (word(&header, 32), u16::from_le_bytes([header[56], header[57]]));
    for index in 0..u64::from(count) {
        let mut program = [0; 56];
        read(offset.saturating_add(index * 56), &mut program)?;
        if word(&program, 0) as u32 == PT_LOAD {
            check_range(path, word(&program, 24), word(&program, 40), limit)?;
        }
    }
    Ok(())
}

fn word(bytes: &[u8], offset: usize) -> u64 {
    bytes.get(offset..offset + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn load_elf(ram: &GuestRam, file: &mut File, path: &Path, limit: u64) -> Result<Loaded, BootError> {
    let loaded = Elf::load(ram, None, file, None).map_err(|error| unusable(path, error.to_string()))?;
    let entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(GuestAddress(entry)) => Entry::Pvh { entry },
        _ => Entry::Linux { entry: loaded.kernel_load.0 },
    };
    let (Entry::Pvh { entry: address } | Entry::Linux { entry: address }) = entry;
    check_range(path, address, 1, limit)?;
    Ok(Loaded { entry, end: loaded.kernel_end, initrd_limit: INITRD_LIMIT, setup: None })
}

fn load_bzimage(ram: &GuestRam, file: &mut File, path: &Path, limit: u64) -> Result<Loaded, BootError> {
    let bytes = file.metadata().map_err(|error| unusable(path, error.to_string()))?.len();
    check_range(path, KERNEL_START, bytes, limit)?;
    let loaded = BzImage::load(ram, Some(GuestAddress(KERNEL_START)), file, None)
        .map_err(|error| unusable(path, error.to_string()))?;
    let Some(setup) = loaded.setup_header else { return Err(unusable(path, "it has no setup header")) };
    if setup.version < 0x20c || setup.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(unusable(path, "it has no 64-bit entry point (Linux 3.8 or newer for x86-64 is needed)"));
    }
    // A relocatable kernel unpacks itself where it was loaded, or at its preferred address if that is higher.
    let runs_at = setup.pref_address.max(KERNEL_START);
    let end = check_range(path, runs_at, setup.init_size.into(), limit)?;
    Ok(Loaded {
        entry: Entry::Linux { entry: loaded.kernel_load.0 + BZIMAGE_ENTRY_64 },
        end: end.max(loaded.kernel_end),
        initrd_limit: u64::from(setup.initrd_addr_max) + 1,
        setup: Some(setup),
    })
}
