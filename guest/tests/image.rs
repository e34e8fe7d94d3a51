//! The embedded image: an ELF file that PVH loaders accept, small, and where the linker script says; and the parts of it
//! that keep account of memory and time.

#[allow(dead_code, missing_docs, unreachable_pub)]
#[path = "../image/src/memory/area.rs"]
mod area;
#[allow(dead_code, missing_docs, unreachable_pub)]
#[path = "../image/src/memory/pool.rs"]
mod pool;

use area::{Area, Range};
use headroom_guest::IMAGE;
use pool::{Pool, Unit};

/// A little-endian number of `BYTES` bytes.
fn number<const BYTES: usize>(offset: usize) -> usize {
    IMAGE[offset..offset + BYTES].iter().rev().fold(0, |value, &byte| value << 8 | usize::from(byte))
}

fn u16_at(offset: usize) -> usize {
    number::<2>(offset)
}

fn u32_at(offset: usize) -> usize {
    number::<4>(offset)
}

fn u64_at(offset: usize) -> usize {
    number::<8>(offset)
}

/// Type, file offset, physical address, bytes in the file, bytes in memory.
fn segments() -> Vec<(usize, usize, usize, usize, usize)> {
    let (table, size, count) = (u64_at(32), u16_at(54), u16_at(56));
    (0..count)
        .map(|index| table + index * size)
        .map(|at| (u32_at(at), u64_at(at + 8), u64_at(at + 24), u64_at(at + 32), u64_at(at + 40)))
        .collect()
}

#[test]
fn it_is_one_small_loadable_segment_at_two_mib() {
    assert_eq!(&IMAGE[..6], b"\x7fELF\x02\x01");
    assert_eq!(u16_at(18), 62, "x86-64");
    let loadable: Vec<_> = segments().into_iter().filter(|segment| segment.0 == 1).collect();
    let [(_, _, address, in_file, in_memory)] = loadable[..] else { panic!("{loadable:x?}") };
    assert_eq!(address, 0x20_0000);
    assert!(in_file <= in_memory && in_memory < 1 << 20, "{in_memory} bytes");
}

#[test]
fn its_note_names_the_pvh_entry() {
    let (_, note, ..) = segments().into_iter().find(|segment| segment.0 == 4).expect("a note segment");
    let (name, description, kind) = (u32_at(note), u32_at(note + 4), u32_at(note + 8));
    assert_eq!((name, description, kind), (4, 8, 18), "XEN_ELFNOTE_PHYS32_ENTRY");
    assert_eq!(&IMAGE[note + 12..note + 16], b"Xen\0");
    let entry = u64_at(note + 16);
    assert_eq!(entry, u64_at(24), "the ELF entry is the PVH entry");
    assert!((0x20_0000..0x30_0000).contains(&entry));
}

#[test]
fn pages_are_numbered_over_all_ranges() {
    let mut area = Area::default();
    area.add(Range { start: 0x1800, end: 0x5000 });
    area.add(Range { start: 0x4000, end: 0x9000 });
    area.add(Range { start: 1 << 32, end: (1 << 32) + 0x2fff });
    area.add(Range { start: u64::MAX - 10, end: u64::MAX });
    assert_eq!((area.pages(), area.end()), (5, (1 << 32) + 0x2000));
    assert_eq!(area.address(0), Some(0x2000));
    assert_eq!(area.address(2), Some(0x4000));
    assert_eq!(area.address(3), Some(1 << 32));
    assert_eq!(area.address(5), None);
    assert_eq!(area.address(u64::MAX), None);
    // A quarter of what is behind the image need not be whole pages.
    assert_eq!(area.clone().take_front(0x1001).bytes(), 0x2000);
    assert_eq!(area.take_front(0x2000), Range { start: 0x2000, end: 0x4000 });
    assert_eq!((area.pages(), area.address(1)), (3, Some(1 << 32)));
}

#[test]
fn memory_is_the_workloads_or_nobodys_or_the_hosts() {
    let mut pool = Pool::new(8);
    assert_eq!(pool.count(Unit::Host), 8);
    // The sweeper has the first two, the filled area the last one.
    assert!(pool.claim(0) && pool.claim(1) && pool.claim(7));
    assert!(!pool.claim(1) && !pool.claim(8));
    assert_eq!((pool.claim_next(1), pool.claim_next(9)), (Some(2), None));
    // What was let go is free once, and what was never had is not let go.
    pool.release(1..4);
    assert_eq!((pool.count(Unit::Free), pool.count(Unit::Host), pool.count(Unit::Used)), (2, 4, 2));
    // In a request it is nobody's to take.
    assert_eq!((pool.lend_free(0), pool.lend_free(2), pool.lend_free(3)), (Some(1), Some(2), None));
    assert!(!pool.claim(1));
    pool.put(1, Unit::Host);
    pool.put(2, Unit::Free);
    // The balloon takes from the end.
    assert_eq!(pool.lend_last(), Some(6));
    pool.put(6, Unit::Ballooned);
    pool.release(0..8);
    assert_eq!((pool.ballooned(), pool.claim(6), pool.count(Unit::Used)), (Some(6), false, 0));
    pool.put(6, Unit::Host);
    assert_eq!((pool.ballooned(), pool.claim(6)), (None, true));
    assert_eq!((0..9).filter_map(|_| pool.lend_last()).count(), 7);
}
