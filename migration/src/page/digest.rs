//! Digests of pages and blocks, kept by the source while it sends them.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::guest::{BLOCK_BYTES, PAGE_BYTES};

/// Digest of what a page or block holds: XXH3, 64 bits. It finds mistakes, not forgers: those stand before TLS.
pub fn digest(data: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(data)
}

/// Digest of a page of zeroes.
pub fn zero_page() -> u64 {
    static ZERO: LazyLock<u64> = LazyLock::new(|| digest(&[0; PAGE_BYTES as usize]));
    *ZERO
}

/// Digest of `bytes` zeroes; `bytes` is at most a block.
pub fn zero_block(bytes: u64) -> u64 {
    static ZERO: LazyLock<u64> = LazyLock::new(|| digest(&vec![0; BLOCK_BYTES as usize]));
    if bytes == BLOCK_BYTES { *ZERO } else { digest(&vec![0; bytes.min(BLOCK_BYTES) as usize]) }
}

/// The digest last sent of each page or block. Channels fill it side by side: within a round each number belongs to one
/// channel, and rounds are separated by acknowledgements.
#[derive(Debug, Default)]
pub struct Digests {
    values: Vec<AtomicU64>,
}

impl Digests {
    /// `count` entries, all of them `initial`.
    pub fn new(count: u64, initial: u64) -> Self {
        Self { values: (0..count).map(|_| AtomicU64::new(initial)).collect() }
    }

    /// How many entries.
    pub fn len(&self) -> u64 {
        self.values.len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Replaces one, and returns what it was; out of range does nothing.
    pub fn set(&self, index: u64, value: u64) -> Option<u64> {
        let slot = self.values.get(index as usize)?;
        let before = slot.load(Ordering::Relaxed);
        slot.store(value, Ordering::Relaxed);
        Some(before)
    }

    /// One of them.
    pub fn get(&self, index: u64) -> Option<u64> {
        self.values.get(index as usize).map(|slot| slot.load(Ordering::Relaxed))
    }

    /// How many equal `value`.
    pub fn count(&self, value: u64) -> u64 {
        self.values.iter().filter(|slot| slot.load(Ordering::Relaxed) == value).count() as u64
    }
}
