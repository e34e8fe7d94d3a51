//! A disk block: sequence number, address and checksum in front of content that depends on both.

use super::Defect;

/// Bytes of a block.
pub const BYTES: usize = 4096;
/// Bytes of header and of each word of content.
const HEADER_BYTES: usize = 32;
const WORD_BYTES: usize = 8;

const MAGIC: u64 = u64::from_le_bytes(*b"hdrmblk1");
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

fn content(sequence: u64, address: u64, index: usize) -> u64 {
    let seed = sequence.rotate_left(20) ^ address.wrapping_mul(MULTIPLIER);
    let number = (seed ^ index as u64).wrapping_mul(MULTIPLIER);
    number ^ (number >> 32)
}

fn checksum(sequence: u64, address: u64, content: &[u8]) -> u64 {
    let words = content.chunks_exact(WORD_BYTES).map(word);
    words.fold(sequence ^ address.rotate_left(32) ^ MAGIC, |sum, word| {
        (sum ^ word).wrapping_mul(MULTIPLIER).rotate_left(29)
    })
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; WORD_BYTES];
    word.copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// Writes the block number `address` with `sequence`.
pub fn write(block: &mut [u8; BYTES], sequence: u64, address: u64) {
    for (index, place) in block[HEADER_BYTES..].chunks_exact_mut(WORD_BYTES).enumerate() {
        place.copy_from_slice(&content(sequence, address, index).to_le_bytes());
    }
    let sum = checksum(sequence, address, &block[HEADER_BYTES..]);
    for (place, value) in block.chunks_exact_mut(WORD_BYTES).zip([MAGIC, sequence, address, sum]) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

/// Checks that block number `address` is the one that was written with `sequence`.
///
/// # Errors
/// Says what is wrong with it.
pub fn check(block: &[u8; BYTES], sequence: u64, address: u64) -> Result<(), Defect> {
    let (header, content) = block.split_at(HEADER_BYTES);
    let mut fields = header.chunks_exact(WORD_BYTES).map(word);
    let mut field = || fields.next().unwrap_or(0);
    let (magic, found_sequence, found_address, sum) = (field(), field(), field(), field());
    if magic != MAGIC {
        return Err(Defect::Lost);
    }
    if sum != checksum(found_sequence, found_address, content) {
        return Err(Defect::Torn);
    }
    if (found_sequence, found_address) != (sequence, address) {
        return Err(Defect::Stale);
    }
    Ok(())
}
