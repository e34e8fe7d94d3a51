//! A fast fingerprint of a page, to see whether it has changed. Nobody is kept from forging it: a guest that does deceives
//! only the estimate of its own dirty rate.

use std::array::from_fn;

/// Words that are mixed side by side: the processor multiplies several at once.
const LANES: usize = 4;

/// Odd, so that multiplying by it loses nothing; from the fraction of the golden ratio (Knuth, TAOCP 3, 6.4).
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// The fingerprint of a page's bytes, a multiple of 32.
///
/// Every step is a bijection of the lane it changes, and so is the last one of each lane: two pages that differ in one word have
/// different fingerprints, always. Others have the same one with a probability of about 2^-64.
pub fn of(page: &[u8]) -> u64 {
    let mut lanes: [u64; LANES] = from_fn(|lane| FACTOR.wrapping_mul(lane as u64 + 1));
    for block in page.chunks_exact(8 * LANES) {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(8)) {
            let word = word.try_into().map_or(0, u64::from_ne_bytes);
            *lane = (*lane ^ word).wrapping_mul(FACTOR).rotate_left(29);
        }
    }
    lanes.into_iter().fold(0, |mixed: u64, lane| (mixed.rotate_left(17) ^ lane).wrapping_mul(FACTOR))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_changed_word_is_always_seen(page in prop::collection::vec(any::<u8>(), 4096), at in 0usize..512, by in 1u64..) {
            let mut other = page.clone();
            let word = u64::from_ne_bytes(other[at * 8..at * 8 + 8].try_into().unwrap()) ^ by;
            other[at * 8..at * 8 + 8].copy_from_slice(&word.to_ne_bytes());
            prop_assert_ne!(of(&page), of(&other));
            prop_assert_eq!(of(&page), of(&page.clone()));
        }
    }

    #[test]
    fn moved_and_repeated_contents_are_told_apart() {
        let mut seen = std::collections::BTreeSet::new();
        seen.insert(of(&[0; 4096]));
        for at in 0..4096 {
            let mut page = [0; 4096];
            page[at] = 1;
            assert!(seen.insert(of(&page)), "a byte at {at}");
        }
        for byte in 1..=255 {
            assert!(seen.insert(of(&[byte; 4096])), "all {byte}");
        }
    }
}
