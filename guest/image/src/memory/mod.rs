//! Memory: what the VMM says there is (PVH start info), the heap, and the area that the workload works on.
//!
//! ```text
//! 0        2 MiB                            HEAP_BYTES on          3 GiB   4 GiB
//! ├────────┼─ image ─┼──────── heap ────────┼─ work area ──────────┤ devices ├─ work area ───┤
//! ```
//! Everything is identity-mapped: the boot tables map the first 4 GiB, [`map_high`] adds the rest.

pub mod area;
pub mod pool;

use alloc::alloc::{Layout, alloc_zeroed};
use alloc::string::String;
use core::slice;

use linked_list_allocator::LockedHeap;

use crate::ring0;
pub use area::{Area, PAGE_BYTES, Range};

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

/// Bytes of the heap: sockets, rings and disk buffers take about 4 MiB, page tables 4 KiB for each GiB above the fourth,
/// the disk verifier 8 bytes for each 64 KiB of disk.
const HEAP_BYTES: u64 = 16 << 20;
/// Least memory left to the workload; on a smaller machine the heap shrinks.
const HEAP_BYTES_MIN: u64 = 6 << 20;

const START_INFO_MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
/// Longest command line that is read, in bytes.
const COMMAND_LINE_BYTES_MAX: usize = 4096;
/// The page tables reach this far.
const MAPPED_MAX: u64 = 512 << 30;
const GIB: u64 = 1 << 30;

/// `hvm_start_info` of the PVH boot protocol, version 1 (Xen, xen/include/public/arch-x86/hvm/start_info.h).
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    modules_address: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// `hvm_memmap_table_entry`.
#[repr(C)]
struct MemoryMapEntry {
    address: u64,
    bytes: u64,
    kind: u32,
    reserved: u32,
}

/// What was found at boot.
pub struct Memory {
    /// The kernel command line; lossy where it is not UTF-8.
    pub command_line: String,
    /// What the workload may use.
    pub area: Area,
    /// All RAM in bytes.
    pub ram_bytes: u64,
}

/// Reads the start info, sets up the heap right after the image, and maps all RAM. To be called once, first.
///
/// # Panics
/// Without a PVH start info that has a memory map, or with too little memory behind the image for a heap: there is nothing
/// to go on with.
pub fn init() -> Memory {
    let start_info = ring0::facts().start_info as *const StartInfo;
    // SAFETY: the VMM passed this address in EBX; it lies in the identity-mapped first 4 GiB, and so do the tables it names.
    let (info, entries) = unsafe {
        let info = &*start_info;
        assert!(info.magic == START_INFO_MAGIC, "not started by the PVH protocol: magic {:#x}", info.magic);
        assert!(info.version >= 1 && info.memory_map_entries != 0, "the PVH start info has no memory map");
        (info, slice::from_raw_parts(info.memory_map as *const MemoryMapEntry, info.memory_map_entries as usize))
    };

    let mut area = Area::default();
    let mut ram_bytes = 0;
    for entry in entries.iter().filter(|entry| entry.kind == RAM) {
        let end = entry.address.saturating_add(entry.bytes).min(MAPPED_MAX);
        ram_bytes += end.saturating_sub(entry.address);
        area.add(Range { start: entry.address.max(ring0::image_end()), end });
    }
    let behind_image = area.bytes();
    let heap_bytes = HEAP_BYTES.min((behind_image / 4).max(HEAP_BYTES_MIN));
    let heap = area.take_front(heap_bytes);
    // Whole pages: as much as was asked for, or a little more.
    assert!(heap.bytes() >= heap_bytes, "{behind_image} bytes behind the image do not hold the heap");
    // SAFETY: the range is RAM behind the image that is taken out of the area, so nothing else uses it.
    unsafe { HEAP.lock().init(heap.start as *mut u8, heap.bytes() as usize) };

    let command_line = read_command_line(info.command_line);
    map_high(area.end());
    Memory { command_line, area, ram_bytes }
}

fn read_command_line(address: u64) -> String {
    if address == 0 {
        return String::new();
    }
    // SAFETY: the VMM put a string that ends in a zero byte there, in the identity-mapped first 4 GiB; we read no further
    // than the zero byte.
    let bytes = unsafe {
        let start = address as *const u8;
        let length = (0..COMMAND_LINE_BYTES_MAX).take_while(|&index| start.add(index).read() != 0).count();
        slice::from_raw_parts(start, length)
    };
    String::from_utf8_lossy(bytes).into_owned()
}

/// Identity-maps `[4 GiB, end)` with 2 MiB pages. Ring 3 may do this: its own tables are mapped for it, and entries that
/// were absent are in no TLB.
fn map_high(end: u64) {
    const PRESENT_WRITABLE_USER: u64 = 0x07;
    const LARGE: u64 = 0x80;
    for gib in 4..end.div_ceil(GIB) {
        let layout = const {
            match Layout::from_size_align(4096, 4096) {
                Ok(layout) => layout,
                Err(_) => panic!("a page has a layout"),
            }
        };
        // SAFETY: the layout is not empty.
        let directory = unsafe { alloc_zeroed(layout) }.cast::<u64>();
        assert!(!directory.is_null(), "no memory for page tables");
        for entry in 0..512 {
            // SAFETY: the directory has 512 entries; it is reachable for the processor only after the next store.
            unsafe {
                directory.add(entry).write(gib * GIB + ((entry as u64) << 21) + LARGE + PRESENT_WRITABLE_USER);
            }
        }
        // SAFETY: `gib` is below 512 (the area ends at `MAPPED_MAX`), and entries from 4 on are unused.
        unsafe {
            ring0::page_directory_pointers()
                .cast::<u64>()
                .add(gib as usize)
                .write_volatile(directory as u64 + PRESENT_WRITABLE_USER);
        }
    }
}
