//! Pages that a guest gives back, as runs.

use std::ops::Range;

use super::PAGE_BYTES;
use crate::device::virtio::{Chain, Segment};

/// Page frame numbers in one request, at most: 256 MiB of memory. Linux sends 256.
pub const FRAMES_MAX: usize = 65536;

/// Bytes of a page frame number.
const FRAME_BYTES: usize = 4;

/// Reads the page frame numbers of a request (section 5.5.6.1) and makes them runs of guest-physical addresses, ascending and
/// without overlap. None of them has been looked at: they may lie anywhere.
///
/// False if there are more than [`FRAMES_MAX`].
pub fn frames(readable: &[Segment], scratch: &mut Vec<u32>, runs: &mut Vec<Range<u64>>) -> bool {
    runs.clear();
    scratch.clear();
    let bytes = Chain::bytes(readable);
    if bytes > FRAMES_MAX * FRAME_BYTES {
        return false;
    }
    let mut piece = [0; 1024];
    let mut done = 0;
    while done < bytes {
        let read = Chain::copy_out(readable, done, &mut piece);
        if read == 0 {
            break;
        }
        done += read;
        scratch.extend(piece[..read].as_chunks().0.iter().map(|&frame| u32::from_le_bytes(frame)));
    }
    scratch.sort_unstable();
    for &frame in &*scratch {
        let start = u64::from(frame) * PAGE_BYTES;
        match runs.last_mut() {
            Some(run) if run.end >= start => run.end = start + PAGE_BYTES,
            _ => runs.push(start..start + PAGE_BYTES),
        }
    }
    true
}

/// The whole pages inside a segment.
pub fn whole_pages(segment: &Segment) -> Range<u64> {
    let start = segment.gpa.next_multiple_of(PAGE_BYTES);
    let end = (segment.gpa + segment.bytes as u64) / PAGE_BYTES * PAGE_BYTES;
    start..end.max(start)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::Memory;

    fn segments(memory: &Memory, cuts: &[usize]) -> Vec<Segment> {
        let (mut segments, mut at) = (Vec::new(), 0);
        for &bytes in cuts {
            assert!(Segment::resolve(memory.ram(), at, bytes, &mut segments));
            at += bytes as u64;
        }
        segments
    }

    #[test]
    fn more_frames_than_allowed_are_not_read() {
        let memory = Memory::new(16).unwrap();
        let (mut scratch, mut runs) = (Vec::new(), Vec::new());
        assert!(frames(&segments(&memory, &[FRAMES_MAX * 4]), &mut scratch, &mut runs));
        assert_eq!((runs.len(), runs[0].clone()), (1, 0..PAGE_BYTES));
        assert!(!frames(&segments(&memory, &[FRAMES_MAX * 4, 1]), &mut scratch, &mut runs));
        assert!(runs.is_empty());
    }

    #[test]
    fn only_whole_pages_count() {
        let memory = Memory::new(16).unwrap();
        let whole = |gpa, bytes| {
            let mut segments = Vec::new();
            assert!(Segment::resolve(memory.ram(), gpa, bytes, &mut segments));
            whole_pages(&segments[0])
        };
        assert_eq!(whole(0x1000, 0x3000), 0x1000..0x4000);
        assert_eq!(whole(0x1001, 0x3000), 0x2000..0x4000);
        assert!(whole(0x1001, 0x1ffe).is_empty());
        assert!(whole(0x1001, 5).is_empty());
    }

    proptest! {
        /// Whatever order, repetition and cuts: the runs cover the frames and nothing else.
        #[test]
        fn runs_cover_the_frames(list in proptest::collection::vec(prop_oneof![0u32..64, any::<u32>()], 0..300), cut in 0usize..1200) {
            let memory = Memory::new(16).unwrap();
            let bytes: Vec<u8> = list.iter().flat_map(|frame| frame.to_le_bytes()).collect();
            memory.ram().write_slice(&bytes, GuestAddress(0)).unwrap();
            let cut = cut.min(bytes.len());
            let (mut scratch, mut runs) = (Vec::new(), Vec::new());
            prop_assert!(frames(&segments(&memory, &[cut, bytes.len() - cut]), &mut scratch, &mut runs));
            let mut expected = list;
            expected.sort_unstable();
            expected.dedup();
            let found: Vec<u32> = runs.iter().flat_map(|run| run.clone().step_by(4096)).map(|gpa| (gpa >> 12) as u32).collect();
            prop_assert_eq!(found, expected);
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
