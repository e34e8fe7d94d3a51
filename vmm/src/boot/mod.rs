//! Putting a kernel into guest memory and the boot vCPU at its entry.
//!
//! | kernel | protocol | entered in |
//! | --- | --- | --- |
//! | ELF with a PVH note | PVH start info (Xen `docs/misc/pvh.pandoc`) | 32-bit protected mode, no paging |
//! | ELF without | 64-bit Linux boot protocol (kernel `Documentation/arch/x86/boot.rst`) | long mode, first 4 GiB identity mapped |
//! | bzImage | the same, entry at 0x200 | the same |
//!
//! ```text
//! 0x00500  descriptors     0x06000  PVH start info, modules, memory map     0x07000  Linux zero page
//! 0x09000  page tables     0x20000  command line     0x9fc00  MP table      1 MiB..  kernel      initrd at the end
//! ```

mod cmdline;
mod kernel;
mod memmap;
mod mptable;
mod registers;
#[cfg(test)]
pub(crate) mod testing;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

pub use cmdline::{MAX_CMDLINE_BYTES, virtio_words};
pub use registers::enter;

use crate::memory::{GuestRam, Memory};

/// A kernel cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A machine that is to boot has none.
    #[error(
        "the configuration names no kernel: set \"kernel\" to an ELF vmlinux or a bzImage, or start with --incoming or --restore"
    )]
    NoKernel,
    /// The file cannot be opened.
    #[error("cannot open the {what} {path}: check the path and its permissions")]
    Open {
        /// Kernel or initial RAM disk.
        what: &'static str,
        /// The configured path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("cannot read the {what} {path}")]
    Read {
        /// Kernel or initial RAM disk.
        what: &'static str,
        /// The configured path.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// Neither ELF nor bzImage.
    #[error("{0} is not a kernel that can be started: an x86-64 ELF (vmlinux) or a bzImage is needed")]
    NotAKernel(PathBuf),
    /// ELF or bzImage, but damaged or of a kind that cannot be loaded.
    #[error("{path} looks like a kernel but cannot be loaded: {detail}")]
    Unusable {
        /// The configured path.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// No room.
    #[error(
        "{path} needs guest memory {start:#x}..{end:#x}, the machine has 0x100000..{limit:#x} for it: raise memory_mib"
    )]
    OutsideRam {
        /// The configured path.
        path: PathBuf,
        /// First address.
        start: u64,
        /// One past the last address.
        end: u64,
        /// End of the low RAM.
        limit: u64,
    },
    /// Too long.
    #[error(
        "the kernel command line has {length} bytes with the virtio devices that are appended, at most {MAX_CMDLINE_BYTES} are possible: shorten \"cmdline\""
    )]
    CmdlineTooLong {
        /// Its length.
        length: usize,
    },
    /// Bytes that end a string.
    #[error("the kernel command line holds a character that is not printable ASCII at byte {0}: remove it")]
    CmdlineCharacter(usize),
    /// Guest memory cannot be written.
    #[error("cannot write boot data to guest memory: raise memory_mib")]
    Memory(#[from] GuestMemoryError),
    /// The boot vCPU cannot be set up.
    #[error(transparent)]
    Kvm(#[from] crate::kvm::KvmError),
}

/// Where the boot vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit, EBX pointing to the start info.
    Pvh {
        /// Physical address.
        entry: u64,
    },
    /// 64-bit, RSI pointing to the zero page.
    Linux {
        /// Physical address, identity mapped.
        entry: u64,
    },
}

/// First address of kernels; what lies below is used by firmware structures.
pub(crate) const KERNEL_START: u64 = 1 << 20;

/// Loads a kernel with its command line and initial RAM disk.
///
/// # Errors
///
/// [`BootError`] that names the file and what is wrong with it.
pub fn load(
    memory: &Memory,
    kernel: &Path,
    initrd: Option<&Path>,
    cmdline: &str,
    vcpus: u16,
) -> Result<Entry, BootError> {
    let ram = memory.ram();
    let low_end = memory.regions().first().map_or(0, |region| region.bytes);
    cmdline::write(ram, cmdline)?;
    let loaded = kernel::load(ram, kernel, low_end)?;
    let initrd = initrd.map(|path| load_initrd(ram, path, loaded.end, low_end.min(loaded.initrd_limit))).transpose()?;
    mptable::write(ram, vcpus)?;
    let map = memmap::memory_map(memory.regions());
    match loaded.entry {
        Entry::Pvh { .. } => memmap::write_start_info(ram, &map, initrd.as_ref())?,
        Entry::Linux { .. } => memmap::write_zero_page(ram, &map, initrd.as_ref(), loaded.setup, cmdline.len())?,
    }
    Ok(loaded.entry)
}

/// Guest-physical range of the initial RAM disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Initrd {
    pub address: u64,
    pub bytes: u64,
}

fn load_initrd(ram: &GuestRam, path: &Path, kernel_end: u64, limit: u64) -> Result<Initrd, BootError> {
    let mut file = open("initial RAM disk", path)?;
    let read = |source| BootError::Read { what: "initial RAM disk", path: path.to_owned(), source };
    let bytes = file.metadata().map_err(read)?.len();
    let address = limit.saturating_sub(bytes) & !0xfff;
    if address < kernel_end {
        return Err(BootError::OutsideRam { path: path.to_owned(), start: kernel_end, end: kernel_end + bytes, limit });
    }
    ram.read_exact_volatile_from(GuestAddress(address), &mut file, bytes as usize)?;
    Ok(Initrd { address, bytes })
}

fn open(what: &'static str, path: &Path) -> Result<File, BootError> {
    let fail = |source| BootError::Open { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(fail)?;
    if file.metadata().map_err(fail)?.is_dir() {
        return Err(fail(io::Error::from_raw_os_error(libc::EISDIR)));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::testing::elf_of as elf;
    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn load_bytes(bytes: &[u8], cmdline: &str) -> Result<Entry, BootError> {
        let memory = Memory::new(16).unwrap();
        load(&memory, file(bytes).path(), None, cmdline, 1)
    }

    #[test]
    fn pvh_kernels_are_entered_at_their_note() {
        assert_eq!(load_bytes(&elf(0x20_0000, 0x2000), "a=b").unwrap(), Entry::Pvh { entry: 0x20_0000 });
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_its_reason() {
        let memory = Memory::new(16).unwrap();
        let missing = load(&memory, Path::new("/nonexistent/vmlinux"), None, "", 1).unwrap_err();
        assert!(matches!(missing, BootError::Open { what: "kernel", .. }), "{missing}");
        assert!(matches!(load(&memory, Path::new("/tmp"), None, "", 1), Err(BootError::Open { .. })));
        assert!(matches!(load_bytes(b"#!/bin/sh\necho no kernel", ""), Err(BootError::NotAKernel(_))));
        assert!(matches!(load_bytes(b"", ""), Err(BootError::NotAKernel(_))));
        assert!(matches!(load_bytes(&elf(0x20_0000, 0x2000)[..70], ""), Err(BootError::Unusable { .. })));
    }

    #[test]
    fn a_kernel_outside_ram_is_refused() {
        for (address, bytes) in [(0x8000, 0x2000), (0xf0_0000, 0x20_0000), (0x1_0000_0000, 16), (u64::MAX - 8, 16)] {
            let error = load_bytes(&elf(address, bytes), "").unwrap_err();
            assert!(matches!(error, BootError::OutsideRam { limit: 0x100_0000, .. }), "{address:#x}: {error}");
        }
    }

    #[test]
    fn command_lines_are_bounded() {
        let kernel = elf(0x20_0000, 0x2000);
        assert!(load_bytes(&kernel, &"x".repeat(MAX_CMDLINE_BYTES)).is_ok());
        let long = load_bytes(&kernel, &"x".repeat(MAX_CMDLINE_BYTES + 1)).unwrap_err();
        assert!(matches!(long, BootError::CmdlineTooLong { length: 2048 }), "{long}");
        assert!(matches!(load_bytes(&kernel, "a\nb"), Err(BootError::CmdlineCharacter(1))));
    }

    #[test]
    fn an_initrd_lies_above_the_kernel() {
        let memory = Memory::new(16).unwrap();
        let kernel = file(&elf(0x20_0000, 0x2000));
        let small = file(&[7; 5000]);
        load(&memory, kernel.path(), Some(small.path()), "", 1).unwrap();
        let first: u8 = memory.ram().read_obj(GuestAddress((16 << 20) - 0x2000)).unwrap();
        assert_eq!(first, 7);
        let large = file(&vec![7; 15 << 20]);
        let error = load(&memory, kernel.path(), Some(large.path()), "", 1).unwrap_err();
        assert!(matches!(error, BootError::OutsideRam { start: 0x20_2000, .. }), "{error}");
    }
}
