//! BLAKE3 over a stopped machine's memory and disks: two images are equal if their digests are.

use migration::guest::{BLOCK_BYTES, BlockReader, GuestError, PAGE_BYTES, SourceDisk};

use super::{Machine, MachineError, lock};
use crate::api::{MachineDigest, MachineState};
use crate::disk::RawDisk;
use crate::memory::MemoryError;

/// Pages read at once.
const CHUNK_PAGES: u64 = 64;

/// A digest cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DigestError {
    /// The machine runs.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A disk.
    #[error("a disk cannot be read")]
    Disk(#[from] GuestError),
}

impl Machine {
    /// Hashes all pages, and all blocks of each disk, holes as zeroes.
    ///
    /// # Errors
    ///
    /// [`DigestError`] if the machine is not paused or fenced, or a disk cannot be read.
    pub fn digest(&self) -> Result<MachineDigest, DigestError> {
        let _transition = lock(&self.transition);
        match self.state() {
            MachineState::Paused | MachineState::Fenced | MachineState::Stopped => {}
            state => return Err(MachineError::State { state, action: "hashed", remedy: ", pause it first" }.into()),
        }
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; (CHUNK_PAGES * PAGE_BYTES) as usize];
        let pages = self.memory().pages();
        for first in (0..pages).step_by(CHUNK_PAGES as usize) {
            let part = &mut buffer[..((pages - first).min(CHUNK_PAGES) * PAGE_BYTES) as usize];
            self.memory().read_pages(first, part)?;
            hasher.update(part);
        }
        let disks = self.disks().iter().map(|disk| disk_digest(disk)).collect::<Result<_, _>>()?;
        Ok(MachineDigest { memory: hasher.finalize().to_hex().to_string(), disks })
    }
}

fn disk_digest(disk: &RawDisk) -> Result<String, GuestError> {
    let mut hasher = blake3::Hasher::new();
    let mut reader = disk.reader()?;
    let mut buffer = Vec::with_capacity(BLOCK_BYTES as usize);
    for block in 0..disk.layout().blocks() {
        read_block(reader.as_mut(), block, &mut buffer)?;
        hasher.update(&buffer);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn read_block(reader: &mut dyn BlockReader, block: u64, buffer: &mut Vec<u8>) -> Result<(), GuestError> {
    reader.submit(block)?;
    buffer.clear();
    while reader.complete(&mut |_, bytes| buffer.extend_from_slice(bytes))? {}
    Ok(())
}
