//! Digests of pages and blocks.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::guest::{BLOCK_BYTES, PAGE_BYTES};

/// Digest of what a page or block holds: XXH3, 64 bits. It finds mistakes, not forgers: those stand before TLS.
pub fn digest(data: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(data)
}

/// A digest by which data is taken to be the same without being compared.
pub type StrongDigest = [u8; 32];

/// BLAKE3 of what a block holds, for [`StrongDigest`].
pub fn strong_digest(data: &[u8]) -> StrongDigest {
    *blake3::hash(data).as_bytes()
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

/// The digest of each block of a disk as it was last sent.
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

    /// Replaces one; out of range does nothing.
    pub fn set(&self, index: u64, value: u64) {
        if let Some(slot) = self.values.get(index as usize) {
            slot.store(value, Ordering::Relaxed);
        }
    }

    /// One of them.
    pub fn get(&self, index: u64) -> Option<u64> {
        self.values.get(index as usize).map(|slot| slot.load(Ordering::Relaxed))
    }
}
