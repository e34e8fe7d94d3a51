//! The sweeper's record: three copies in a page, at its start, middle and end, each of step, page frame number and a check
//! word that also depends on the place. Reading and writing them touches three cache lines of the page's 64.

use super::{Defect, mix};

/// Words of a page.
pub const WORDS: usize = 512;

/// A page as words.
pub type Page = [u64; WORDS];

/// Where the copies lie, as word indices.
const PLACES: [usize; 3] = [0, 254, WORDS - 3];

/// Keeps an empty page from looking like the record of step 0.
const SALT: u64 = u64::from_le_bytes(*b"headroom");

fn check_word(step: u64, frame: u64, place: usize) -> u64 {
    mix(SALT ^ step ^ frame.rotate_left(32) ^ ((place as u64) << 17))
}

/// Writes the record of `step` into the page with number `frame`.
pub fn write(page: &mut Page, frame: u64, step: u64) {
    for place in PLACES {
        page[place] = step;
        page[place + 1] = frame;
        page[place + 2] = check_word(step, frame, place);
    }
}

/// Checks that the page with number `frame` holds exactly the record of `step`.
///
/// # Errors
/// Says what is wrong with it.
pub fn check(page: &Page, frame: u64, step: u64) -> Result<(), Defect> {
    let intact = PLACES.iter().all(|&place| {
        page[place] == step && page[place + 1] == frame && page[place + 2] == check_word(step, frame, place)
    });
    if intact { Ok(()) } else { Err(diagnose(page)) }
}

/// The step and frame of each copy that is a record at all.
pub fn records(page: &Page) -> [Option<(u64, u64)>; 3] {
    PLACES.map(|place| {
        let (step, frame) = (page[place], page[place + 1]);
        (page[place + 2] == check_word(step, frame, place)).then_some((step, frame))
    })
}

#[cold]
fn diagnose(page: &Page) -> Defect {
    let records = records(page);
    match records {
        [None, None, None] => Defect::Lost,
        [Some(first), Some(second), Some(third)] if first == second && second == third => Defect::Stale,
        _ => Defect::Torn,
    }
}
