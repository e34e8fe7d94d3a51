//! The memory that the workload works on: whole pages out of a few ranges, numbered in order of address.

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;

const RANGES_MAX: usize = 8;

/// Physical addresses from `start` up to but not including `end`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub end: u64,
}

impl Range {
    pub fn bytes(self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

/// Pages `0..pages()`, by address.
#[derive(Clone, Debug, Default)]
pub struct Area {
    ranges: [Range; RANGES_MAX],
    count: usize,
}

impl Area {
    /// Adds the whole pages of a range. Ranges come in ascending order, as the memory map has them; what does not fit
    /// into the list or is out of order is left out.
    pub fn add(&mut self, range: Range) {
        let Some(start) = range.start.checked_next_multiple_of(PAGE_BYTES) else {
            return;
        };
        let range = Range { start, end: range.end / PAGE_BYTES * PAGE_BYTES };
        if range.bytes() != 0 && self.count < RANGES_MAX && range.start >= self.end() {
            self.ranges[self.count] = range;
            self.count += 1;
        }
    }

    fn ranges(&self) -> &[Range] {
        &self.ranges[..self.count]
    }

    /// Where the last range ends; 0 if there is none.
    pub fn end(&self) -> u64 {
        self.ranges().last().map_or(0, |range| range.end)
    }

    /// Bytes of all ranges.
    pub fn bytes(&self) -> u64 {
        self.ranges().iter().map(|range| range.bytes()).sum()
    }

    /// Pages of all ranges.
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE_BYTES
    }

    /// Takes `bytes`, rounded up to whole pages, from the front of the first range that has as many, or as many as the first
    /// range has.
    pub fn take_front(&mut self, bytes: u64) -> Range {
        let bytes = bytes.next_multiple_of(PAGE_BYTES);
        let ranges = &mut self.ranges[..self.count];
        let index = ranges.iter().position(|range| range.bytes() >= bytes).unwrap_or(0);
        let Some(range) = ranges.get_mut(index) else {
            return Range::default();
        };
        let taken = Range { start: range.start, end: range.start + bytes.min(range.bytes()) };
        range.start = taken.end;
        taken
    }

    /// Physical address of page `page`, or `None` behind the last.
    pub fn address(&self, page: u64) -> Option<u64> {
        let mut offset = page.checked_mul(PAGE_BYTES)?;
        for range in self.ranges() {
            if offset < range.bytes() {
                return Some(range.start + offset);
            }
            offset -= range.bytes();
        }
        None
    }
}
