//! The sweeper: goes over its pages again and again. Pass number n is step n; before it writes step n into a page it checks
//! that the page holds exactly what it left there.
//!
//! ```text
//! page   0 ............ cursor ............ known ............ size
//! holds  │    step      │     step - 1      │ never written      │
//! ```
//! Growing and shrinking keep this picture, so nothing is forgotten when the size changes.

use super::page::{self, Page};
use super::{Defect, Defects};

/// Memory by page index.
pub trait Pages {
    /// The page and its frame number (physical address / 4096), or `None` behind the last.
    fn page(&mut self, index: u64) -> Option<(&mut Page, u64)>;
}

/// A defect, with what is needed to find its cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    pub defect: Defect,
    pub frame: u64,
    /// The step that should have been there.
    pub expected: u64,
    /// Step and frame of the copies that are there.
    pub found: [Option<(u64, u64)>; 3],
}

/// The sweeper's state; its memory is passed to each call.
#[derive(Clone, Debug)]
pub struct Sweeper {
    size: u64,
    known: u64,
    cursor: u64,
    step: u64,
    checked: u64,
    defects: Defects,
}

impl Sweeper {
    /// A sweeper over no pages.
    pub fn new() -> Self {
        Self { size: 0, known: 0, cursor: 0, step: 1, checked: 0, defects: Defects::default() }
    }

    /// Changes the number of pages.
    pub fn resize(&mut self, pages: u64) {
        self.size = pages;
        self.known = self.known.min(pages);
        if self.cursor >= pages {
            self.wrap();
        }
    }

    /// The next pass, if this one has come to the end of all pages.
    fn wrap(&mut self) {
        if self.cursor != 0 {
            self.cursor = 0;
            self.step += 1;
        }
    }

    /// Checks and writes the next page. `Ok(false)`: there is none.
    ///
    /// # Errors
    /// Says what is wrong with the page; it was counted, and the page is good again.
    pub fn advance(&mut self, memory: &mut impl Pages) -> Result<bool, Finding> {
        if self.cursor >= self.size {
            return Ok(false);
        }
        let Some((page, frame)) = memory.page(self.cursor) else {
            return Ok(false);
        };
        let mut result = Ok(true);
        if self.cursor < self.known {
            let expected = self.step - 1;
            self.checked += 1;
            if let Err(defect) = page::check(page, frame, expected) {
                self.defects.count(defect);
                result = Err(Finding { defect, frame, expected, found: page::records(page) });
            }
        }
        page::write(page, frame, self.step);
        self.cursor += 1;
        self.known = self.known.max(self.cursor);
        if self.cursor == self.size {
            self.wrap();
        }
        result
    }

    /// The pass that is being made, from 1.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Pages checked so far.
    pub fn checked(&self) -> u64 {
        self.checked
    }

    /// Defects found so far.
    pub fn defects(&self) -> Defects {
        self.defects
    }
}
