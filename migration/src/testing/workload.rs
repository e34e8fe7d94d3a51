//! What the fake guest does, and the oracle that knows what its memory and disks must hold.
//!
//! The guest sweeps over a range of pages: in step `n` it finds in each page what step `n - 1` left there, and replaces it.
//! On the disk it does the same with blocks. Its registers travel in the machine's state, so the oracle at the
//! destination knows exactly which page must hold which step: a page that is lost, stale or torn is found.

use serde::{Deserialize, Serialize};

use super::FakeDisk;
use super::disk::BLOCK;
use super::memory::FakeMemory;
use crate::guest::PAGE_BYTES;

const PAGE: usize = PAGE_BYTES as usize;

/// What the guest is told to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Workload {
    /// Pages 0.. that hold data and are never written.
    pub filled_pages: u64,
    /// Pages after those that are swept.
    pub sweep_pages: u64,
    /// A write changes a few bytes of a page instead of all of it.
    #[serde(default)]
    pub small_writes: bool,
    /// Pages written per millisecond; 0 is idle.
    pub pages_per_ms: u64,
    /// Blocks 0.. of the first disk that are swept.
    pub sweep_blocks: u64,
    /// Blocks written for each 16 pages.
    pub blocks_per_16_pages: u64,
}

/// The state of the guest's processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Registers {
    /// Pages swept since the start.
    pub page_count: u64,
    /// Blocks swept since the start.
    pub block_count: u64,
    /// What it was told to do.
    pub workload: Workload,
}

fn pattern(number: u64, step: u64, data: &mut [u8]) {
    // Now and then a page or block becomes zero again.
    if step % 4 == 3 && number.is_multiple_of(5) {
        data.fill(0);
        return;
    }
    let seed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ step.wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    for (index, word) in data.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(seed.wrapping_add(index as u64) | 1).to_le_bytes());
    }
}

/// Step `step` of page `number`, where a write changes little.
fn small_pattern(number: u64, step: u64, data: &mut [u8]) {
    pattern(number, step, data);
    if data.iter().any(|&byte| byte != 0) {
        // Noise that no compression makes smaller, and what the step left in it.
        let mut word = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for into in data.chunks_exact_mut(8) {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            into.copy_from_slice(&word.to_le_bytes());
        }
        data[..8].copy_from_slice(&step.to_le_bytes());
    }
}

/// Which step entry `index` of `count` swept ones holds after `done` writes; 0 is untouched.
fn step_of(index: u64, count: u64, done: u64) -> u64 {
    done / count + u64::from(index < done % count)
}

impl Registers {
    /// Fills the pages that are never written again.
    pub fn fill(&self, memory: &FakeMemory) {
        let mut page = [0; PAGE];
        for number in 0..self.workload.filled_pages {
            // One in eight is all zeroes, as in real guests.
            if number % 8 == 3 {
                page.fill(0);
            } else {
                pattern(number, 0, &mut page);
            }
            memory.write(number, &page, true);
        }
    }

    /// Checks and writes the next page.
    pub fn sweep_page(&mut self, memory: &FakeMemory) -> Result<(), String> {
        let count = self.workload.sweep_pages;
        let index = self.page_count % count;
        let (number, mut page) = (self.workload.filled_pages + index, [0; PAGE]);
        self.check_page(memory, index)?;
        self.page_count += 1;
        self.swept(number, step_of(index, count, self.page_count), &mut page);
        memory.write(number, &page, true);
        Ok(())
    }

    fn swept(&self, number: u64, step: u64, page: &mut [u8]) {
        if self.workload.small_writes { small_pattern(number, step, page) } else { pattern(number, step, page) }
    }

    fn check_page(&self, memory: &FakeMemory, index: u64) -> Result<(), String> {
        let step = step_of(index, self.workload.sweep_pages, self.page_count);
        let number = self.workload.filled_pages + index;
        let (mut held, mut expected) = ([0; PAGE], [0; PAGE]);
        if step > 0 {
            self.swept(number, step, &mut expected);
        }
        memory.read(number, &mut held);
        if held == expected { Ok(()) } else { Err(format!("page {number} does not hold step {step}")) }
    }

    /// Checks and writes the next block.
    pub fn sweep_block(&mut self, disk: &FakeDisk) -> Result<(), String> {
        let count = self.workload.sweep_blocks;
        let index = self.block_count % count;
        self.check_block(disk, index)?;
        self.block_count += 1;
        let mut block = vec![0; BLOCK];
        pattern(index, step_of(index, count, self.block_count), &mut block);
        disk.guest_write(index, block);
        Ok(())
    }

    fn check_block(&self, disk: &FakeDisk, index: u64) -> Result<(), String> {
        let step = step_of(index, self.workload.sweep_blocks, self.block_count);
        let mut expected = vec![0; BLOCK];
        if step > 0 {
            pattern(index, step, &mut expected);
        }
        let held = disk.block(index).unwrap_or_else(|| vec![0; BLOCK]);
        if held == expected { Ok(()) } else { Err(format!("block {index} does not hold step {step}")) }
    }

    /// Checks all memory and the first disk; the guest is stopped.
    pub fn check_all(&self, memory: &FakeMemory, disk: Option<&FakeDisk>, pages: u64) -> Result<(), String> {
        let (mut held, mut expected) = ([0; PAGE], [0; PAGE]);
        for number in 0..self.workload.filled_pages {
            memory.read(number, &mut held);
            if number % 8 == 3 {
                expected.fill(0);
            } else {
                pattern(number, 0, &mut expected);
            }
            if held != expected {
                return Err(format!("page {number}, which never changes, has changed"));
            }
        }
        for index in 0..self.workload.sweep_pages {
            self.check_page(memory, index)?;
        }
        for number in self.workload.filled_pages + self.workload.sweep_pages..pages {
            memory.read(number, &mut held);
            if held != [0; PAGE] {
                return Err(format!("page {number}, which was never used, is not zero"));
            }
        }
        if let Some(disk) = disk {
            for index in 0..self.workload.sweep_blocks {
                self.check_block(disk, index)?;
            }
        }
        Ok(())
    }
}
