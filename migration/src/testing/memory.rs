//! Guest memory in chunks, each behind a lock; a chunk that was never written takes no space.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Absent;
use crate::guest::PAGE_BYTES;
use crate::page::Bitmap;

const PAGE: usize = PAGE_BYTES as usize;
/// Pages behind one lock.
const CHUNK_PAGES: u64 = 64;

/// Pages, and which of them were written.
pub struct FakeMemory {
    chunks: Vec<Mutex<Vec<u8>>>,
    dirty: Vec<AtomicU64>,
    tracking: AtomicBool,
    pages: u64,
    /// Pages that have not arrived: whoever touches one waits.
    pub absent: Arc<Absent>,
}

impl FakeMemory {
    /// `pages` pages of zeroes.
    pub fn new(pages: u64) -> Self {
        Self {
            chunks: (0..pages.div_ceil(CHUNK_PAGES)).map(|_| Mutex::default()).collect(),
            dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            tracking: AtomicBool::new(false),
            pages,
            absent: Absent::new(),
        }
    }

    fn chunk(&self, page: u64) -> MutexGuard<'_, Vec<u8>> {
        self.chunks[(page / CHUNK_PAGES) as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts or stops the recording of written pages; starting keeps what was recorded.
    pub fn track(&self, on: bool) {
        self.tracking.store(on, Ordering::SeqCst);
    }

    /// Whether writes are recorded.
    pub fn is_tracking(&self) -> bool {
        self.tracking.load(Ordering::SeqCst)
    }

    /// Moves the recorded pages into `into`.
    pub fn collect(&self, into: &mut Bitmap) {
        for (word, bits) in self.dirty.iter().enumerate() {
            into.insert_word(word as u64, bits.swap(0, Ordering::SeqCst));
        }
    }

    /// Writes whole pages; `recorded` as the guest does it.
    pub fn write(&self, first: u64, data: &[u8], recorded: bool) {
        for (page, bytes) in (first..).zip(data.chunks_exact(PAGE)) {
            if recorded {
                self.absent.wait(page);
            }
            let mut chunk = self.chunk(page);
            if chunk.is_empty() {
                chunk.resize(CHUNK_PAGES as usize * PAGE, 0);
            }
            let at = (page % CHUNK_PAGES) as usize * PAGE;
            chunk[at..at + PAGE].copy_from_slice(bytes);
            // Recorded before the lock goes: whoever reads the new page and collects later learns of it.
            if recorded && self.is_tracking() {
                self.dirty[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::SeqCst);
            }
        }
    }

    /// Copies whole pages out.
    pub fn read(&self, first: u64, buffer: &mut [u8]) {
        (first..first + (buffer.len() / PAGE) as u64).for_each(|page| self.absent.wait(page));
        let mut page = first;
        let mut rest = buffer;
        while !rest.is_empty() {
            let chunk = self.chunk(page);
            let inside = page % CHUNK_PAGES;
            let count = ((CHUNK_PAGES - inside) as usize).min(rest.len() / PAGE);
            let (now, later) = rest.split_at_mut(count * PAGE);
            if chunk.is_empty() {
                now.fill(0);
            } else {
                now.copy_from_slice(&chunk[inside as usize * PAGE..][..count * PAGE]);
            }
            (rest, page) = (later, page + count as u64);
        }
    }

    /// The first run of pages at or after `from` that may hold something.
    pub fn next_populated(&self, from: u64) -> Option<Range<u64>> {
        let start = (from..self.pages).find(|&page| !self.chunk(page).is_empty())?;
        let end = (start + 1..self.pages).find(|&page| self.chunk(page).is_empty()).unwrap_or(self.pages);
        Some(start..end)
    }

    /// Forgets everything.
    pub fn clear(&self) {
        for chunk in &self.chunks {
            *chunk.lock().unwrap_or_else(PoisonError::into_inner) = Vec::new();
        }
    }
}
