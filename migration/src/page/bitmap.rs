//! A bitmap over page or block numbers.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// One bit for each page or block, in words of 64. Bits past the end do not exist: setting one is refused.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Bitmap {
    words: Vec<u64>,
    len: u64,
}

impl Bitmap {
    /// `len` clear bits.
    pub fn new(len: u64) -> Self {
        Self { words: vec![0; len.div_ceil(64) as usize], len }
    }

    /// `len` set bits.
    pub fn full(len: u64) -> Self {
        let mut bitmap = Self::new(len);
        bitmap.insert_range(0..len);
        bitmap
    }

    /// Number of bits, set or not.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if no bit is set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Number of set bits.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether bit `index` is set; false past the end.
    pub fn contains(&self, index: u64) -> bool {
        index < self.len && self.words[(index / 64) as usize] >> (index % 64) & 1 == 1
    }

    /// Sets bit `index`; returns false, and does nothing, past the end.
    pub fn insert(&mut self, index: u64) -> bool {
        let inside = index < self.len;
        if inside {
            self.words[(index / 64) as usize] |= 1 << (index % 64);
        }
        inside
    }

    /// Clears bit `index`.
    pub fn remove(&mut self, index: u64) {
        if index < self.len {
            self.words[(index / 64) as usize] &= !(1 << (index % 64));
        }
    }

    /// Sets a range, cut at the end of the bitmap.
    pub fn insert_range(&mut self, range: Range<u64>) {
        let end = range.end.min(self.len);
        let mut index = range.start;
        while index < end {
            let word_end = (index / 64 + 1) * 64;
            let upto = end.min(word_end);
            let width = upto - index;
            let mask = if width == 64 { u64::MAX } else { ((1u64 << width) - 1) << (index % 64) };
            self.words[(index / 64) as usize] |= mask;
            index = upto;
        }
    }

    /// Sets 64 bits at once, as a kernel hands them out: bit 0 of `bits` is bit `word * 64` here. Bits past the end are
    /// dropped.
    pub fn insert_word(&mut self, word: u64, bits: u64) {
        let Some(slot) = self.words.get_mut(word as usize) else { return };
        let left = self.len - word * 64;
        *slot |= if left >= 64 { bits } else { bits & ((1 << left) - 1) };
    }

    /// Sets every bit that is set in `other`.
    pub fn union(&mut self, other: &Self) {
        for (word, bits) in other.words.iter().enumerate() {
            self.insert_word(word as u64, *bits);
        }
    }

    /// Clears every bit that is set in `other`.
    pub fn subtract(&mut self, other: &Self) {
        for (word, bits) in self.words.iter_mut().zip(&other.words) {
            *word &= !bits;
        }
    }

    /// Whether every bit that is set here is set in `other` too.
    pub fn is_subset(&self, other: &Self) -> bool {
        self.len == other.len && self.words.iter().zip(&other.words).all(|(word, bits)| word & !bits == 0)
    }

    /// The words, 64 bits each.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Clears every bit.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The first run of set bits at or after `from`, at most `limit` long.
    pub fn next_run(&self, from: u64, limit: u64) -> Option<Range<u64>> {
        let start = self.next_set(from)?;
        let bound = self.len.min(start.saturating_add(limit.max(1)));
        let mut end = start;
        while end < bound {
            let rest = !(self.words[(end / 64) as usize] >> (end % 64));
            let ones = u64::from(rest.trailing_zeros()).min(64 - end % 64);
            if ones == 0 {
                break;
            }
            end += ones;
        }
        Some(start..end.min(bound))
    }

    /// The numbers of the set bits in `range`, ascending.
    pub fn numbers(&self, range: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let mut next = range.start;
        std::iter::from_fn(move || {
            let found = self.next_set(next).filter(|&found| found < range.end)?;
            next = found + 1;
            Some(found)
        })
    }

    fn next_set(&self, from: u64) -> Option<u64> {
        if from >= self.len {
            return None;
        }
        let mut word = (from / 64) as usize;
        let mut bits = self.words[word] & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.words.get(word)?;
        }
        Some(word as u64 * 64 + u64::from(bits.trailing_zeros()))
    }
}

/// A bitmap that channels fill side by side: within a round each number belongs to one channel, and rounds are separated
/// by acknowledgements.
#[derive(Debug, Default)]
pub struct SharedBitmap {
    words: Vec<AtomicU64>,
}

impl SharedBitmap {
    /// `len` clear bits.
    pub fn new(len: u64) -> Self {
        Self { words: (0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Sets bit `index` and returns what it was; past the end it does nothing.
    pub fn insert(&self, index: u64) -> bool {
        let mask = 1 << (index % 64);
        self.words.get((index / 64) as usize).is_some_and(|word| word.fetch_or(mask, Ordering::AcqRel) & mask != 0)
    }

    /// Clears bit `index` and returns what it was.
    pub fn remove(&self, index: u64) -> bool {
        let mask = 1 << (index % 64);
        self.words.get((index / 64) as usize).is_some_and(|word| word.fetch_and(!mask, Ordering::AcqRel) & mask != 0)
    }

    /// Whether bit `index` is set.
    pub fn contains(&self, index: u64) -> bool {
        let mask = 1 << (index % 64);
        self.words.get((index / 64) as usize).is_some_and(|word| word.load(Ordering::Acquire) & mask != 0)
    }

    /// Clears every bit that is set in `other`.
    pub fn subtract(&self, other: &Bitmap) {
        for (word, bits) in self.words.iter().zip(other.words()) {
            if *bits != 0 {
                word.fetch_and(!bits, Ordering::Relaxed);
            }
        }
    }

    /// Number of set bits.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn refuses_bits_past_the_end() {
        let mut bitmap = Bitmap::new(70);
        assert!(!bitmap.insert(70));
        bitmap.insert_word(1, u64::MAX);
        bitmap.insert_word(2, u64::MAX);
        assert_eq!(bitmap.count(), 6);
        assert_eq!(Bitmap::full(70).count(), 70);
    }

    #[test]
    fn a_shared_bitmap_tells_what_was_there() {
        let bitmap = SharedBitmap::new(65);
        assert!(!bitmap.insert(64) && bitmap.insert(64) && !bitmap.insert(0));
        assert_eq!(bitmap.count(), 2);
        assert!(bitmap.remove(64) && !bitmap.remove(64) && !bitmap.insert(200));
        assert_eq!(bitmap.count(), 1);
        assert!(bitmap.contains(0) && !bitmap.contains(64) && !bitmap.contains(200));
        bitmap.insert(64);
        let mut other = Bitmap::new(65);
        other.insert_range(0..3);
        bitmap.subtract(&other);
        assert!(!bitmap.contains(0) && bitmap.contains(64));
    }

    proptest! {
        #[test]
        fn runs_cover_exactly_the_set_bits(len in 1u64..400, set in proptest::collection::vec(0u64..400, 0..120), limit in 1u64..90) {
            let mut bitmap = Bitmap::new(len);
            let mut expected: Vec<u64> = set.into_iter().filter(|&bit| bitmap.insert(bit)).collect();
            expected.sort_unstable();
            expected.dedup();
            let (mut seen, mut from) = (Vec::new(), 0);
            while let Some(run) = bitmap.next_run(from, limit) {
                prop_assert!(!run.is_empty() && run.end - run.start <= limit);
                from = run.end;
                seen.extend(run);
            }
            prop_assert_eq!(&seen, &expected);
            prop_assert_eq!(bitmap.count(), expected.len() as u64);
        }
    }
}
