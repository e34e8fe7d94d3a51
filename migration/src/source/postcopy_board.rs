//! What the destination lacks, seen from the source: what it may ask for, and what is to be pushed next.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::page::Bitmap;
use crate::wire::WireError;
use crate::wire::missing::MissingList;

/// Recent faults whose neighbourhood is pushed first.
const HOT: usize = 4;
/// How far behind a fault counts as its neighbourhood, in pages or blocks.
const NEAR: u64 = 512;

/// Shared by the fault thread and all push threads.
pub(super) struct Board {
    owed: MissingList,
    memory: Mutex<Unsent>,
    disks: Vec<Mutex<Unsent>>,
}

/// What was not sent in this session, of memory or of one disk.
struct Unsent {
    left: Bitmap,
    /// Where recent faults were, the newest first; each moves on as its neighbourhood is pushed.
    hot: VecDeque<u64>,
    sweep: u64,
}

impl Unsent {
    fn new(left: Bitmap) -> Self {
        Self { left, hot: VecDeque::new(), sweep: 0 }
    }

    fn demand(&mut self, number: u64) {
        self.left.remove(number);
        // A guest that walks through memory moves the mark that is there, instead of making a new one for each step.
        self.hot.retain(|&mark| !(number.saturating_sub(NEAR)..=number.saturating_add(NEAR)).contains(&mark));
        self.hot.push_front(number);
        self.hot.truncate(HOT);
    }

    fn next(&mut self, limit: u64) -> Option<Range<u64>> {
        while let Some(mark) = self.hot.front_mut() {
            match self.left.next_run(*mark, limit) {
                Some(run) if run.start - *mark <= NEAR => {
                    *mark = run.end;
                    // The next one's turn.
                    self.hot.rotate_left(1);
                    return Some(self.take(run));
                }
                _ => self.hot.pop_front(),
            };
        }
        let run = self.left.next_run(self.sweep, limit).or_else(|| self.left.next_run(0, limit))?;
        self.sweep = run.end;
        Some(self.take(run))
    }

    fn take(&mut self, run: Range<u64>) -> Range<u64> {
        for number in run.clone() {
            self.left.remove(number);
        }
        run
    }
}

fn locked(unsent: &Mutex<Unsent>) -> MutexGuard<'_, Unsent> {
    unsent.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Board {
    /// The destination lacks `owed`, and may ask for nothing else.
    pub(super) fn new(owed: MissingList) -> Self {
        let disks = owed.disks.iter().cloned().map(|left| Mutex::new(Unsent::new(left)));
        Self { memory: Mutex::new(Unsent::new(owed.pages.clone())), disks: disks.collect(), owed }
    }

    /// An empty list of the same shape as what is owed.
    pub(super) fn nothing(&self) -> MissingList {
        let disks = self.owed.disks.iter().map(|bitmap| Bitmap::new(bitmap.len()));
        MissingList { pages: Bitmap::new(self.owed.pages.len()), disks: disks.collect() }
    }

    /// A new session begins: what the destination still lacks is sent again, whatever was sent before.
    ///
    /// # Errors
    ///
    /// [`WireError::Malformed`] if it says that it lacks what it had.
    pub(super) fn restart(&self, lacks: &MissingList) -> Result<(), WireError> {
        if !lacks.is_subset(&self.owed) {
            let detail = "it holds pages or blocks that the destination had at the switchover".to_owned();
            return Err(WireError::Malformed { kind: "list of what is missing", detail });
        }
        *locked(&self.memory) = Unsent::new(lacks.pages.clone());
        for (unsent, left) in self.disks.iter().zip(&lacks.disks) {
            *locked(unsent) = Unsent::new(left.clone());
        }
        Ok(())
    }

    /// The guest waits for `number`: it is not to be pushed any more, and what follows it comes next. It is sent again if it
    /// was pushed already, since it may lie behind much else on the push channel: the destination drops the later copy.
    ///
    /// # Errors
    ///
    /// [`WireError::OutOfRange`] if the destination has it, or there is no such thing.
    pub(super) fn demand(&self, disk: Option<u16>, number: u64) -> Result<(), WireError> {
        let (owed, unsent) = match disk {
            None => (Some(&self.owed.pages), Some(&self.memory)),
            Some(disk) => (self.owed.disks.get(usize::from(disk)), self.disks.get(usize::from(disk))),
        };
        match owed.zip(unsent) {
            Some((owed, unsent)) if owed.contains(number) => {
                locked(unsent).demand(number);
                Ok(())
            }
            found => {
                let what = disk.map_or("demanded pages".to_owned(), |disk| format!("demanded blocks of disk {disk}"));
                let limit = found.map_or(0, |(owed, _)| owed.len());
                Err(WireError::OutOfRange { what, first: number, count: 1, limit })
            }
        }
    }

    /// The next pages to push.
    pub(super) fn next_pages(&self, limit: u64) -> Option<Range<u64>> {
        locked(&self.memory).next(limit)
    }

    /// The next block to push of a disk.
    pub(super) fn next_block(&self, disk: usize) -> Option<u64> {
        self.disks.get(disk).and_then(|unsent| locked(unsent).next(1)).map(|run| run.start)
    }

    /// Bytes not sent in this session.
    pub(super) fn left_bytes(&self) -> u64 {
        let disks = self.disks.iter().map(|unsent| locked(unsent).left.clone());
        MissingList { pages: locked(&self.memory).left.clone(), disks: disks.collect() }.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn board(pages: u64) -> Board {
        Board::new(MissingList { pages: Bitmap::full(pages), disks: vec![Bitmap::full(4)] })
    }

    #[test]
    fn what_follows_a_fault_is_pushed_first_and_nothing_twice() {
        let board = board(10_000);
        assert_eq!(board.next_pages(4), Some(0..4));
        board.demand(None, 5000).unwrap();
        assert_eq!(board.next_pages(4), Some(5001..5005));
        // The guest walks on: still one neighbourhood, from where it is now.
        board.demand(None, 5007).unwrap();
        assert_eq!(board.next_pages(4), Some(5008..5012));
        board.demand(None, 9000).unwrap();
        let both = [board.next_pages(1).unwrap().start, board.next_pages(1).unwrap().start];
        assert_eq!(both, [9001, 5012]);
        let mut seen = Bitmap::new(10_000);
        seen.insert_range(0..4);
        seen.insert_range(5000..5005);
        seen.insert_range(5007..5013);
        seen.insert_range(9000..9002);
        while let Some(run) = board.next_pages(64) {
            for page in run {
                assert!(!seen.contains(page), "page {page} twice");
                seen.insert(page);
            }
        }
        assert_eq!(seen.count(), 10_000);
    }

    #[test]
    fn only_what_is_owed_is_given_and_owed_again() {
        let mut owed = MissingList { pages: Bitmap::new(100), disks: vec![Bitmap::new(4)] };
        owed.pages.insert_range(10..20);
        let board = Board::new(owed.clone());
        assert!(board.demand(None, 9).is_err() && board.demand(None, u64::MAX).is_err());
        assert!(board.demand(Some(0), 0).is_err() && board.demand(Some(1), 0).is_err());
        board.demand(None, 19).unwrap();
        while board.next_pages(8).is_some() {}
        owed.pages.remove(12);
        board.restart(&owed).unwrap();
        assert_eq!((board.next_pages(8), board.left_bytes()), (Some(10..12), 7 * crate::guest::PAGE_BYTES));
        owed.pages.insert(50);
        assert!(board.restart(&owed).is_err());
    }
}
