//! Content for memory that is filled once: every word differs, none is zero, and it depends on the place, so it can be
//! neither skipped as a zero page nor shared, and any change of it can be seen.

use super::page::Page;

const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

fn word(frame: u64, index: usize) -> u64 {
    let number = (frame * 512 + index as u64).wrapping_mul(MULTIPLIER);
    (number ^ (number >> 29)) | 1
}

/// Fills the page with number `frame`.
pub fn write(page: &mut Page, frame: u64) {
    for (index, place) in page.iter_mut().enumerate() {
        *place = word(frame, index);
    }
}

/// Whether the page with number `frame` is as `write` left it.
pub fn check(page: &Page, frame: u64) -> bool {
    page.iter().enumerate().fold(0, |difference, (index, &found)| difference | (found ^ word(frame, index))) == 0
}
