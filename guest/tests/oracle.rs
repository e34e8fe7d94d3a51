//! The image's own check routines, compiled for the host: they find every kind of damage and invent none.

#[allow(dead_code, missing_docs, unreachable_pub)]
#[path = "../image/src/oracle/mod.rs"]
mod oracle;

use std::collections::HashMap;

use oracle::block;
use oracle::page::{self, Page, WORDS};
use oracle::sweep::{Pages, Sweeper};
use oracle::verifier::{self, CHUNK_BLOCKS, CHUNK_BYTES, Job, Verifier};
use oracle::{Defect, fill};
use proptest::prelude::*;

/// Memory whose frames are not its indices, as in the guest.
struct Memory(Vec<Page>);

const FIRST_FRAME: u64 = 0x1200;

impl Pages for Memory {
    fn page(&mut self, index: u64) -> Option<(&mut Page, u64)> {
        self.0.get_mut(index as usize).map(|page| (page, FIRST_FRAME + index))
    }
}

impl Memory {
    fn new(pages: usize) -> Self {
        Self(vec![[0; WORDS]; pages])
    }
}

fn sweep(sweeper: &mut Sweeper, memory: &mut Memory, pages: usize) -> Vec<(u64, Defect)> {
    let mut found = Vec::new();
    for _ in 0..pages {
        if let Err(finding) = sweeper.advance(memory) {
            found.push((finding.frame, finding.defect));
        }
    }
    found
}

#[test]
fn an_undisturbed_sweep_finds_nothing() {
    let (mut memory, mut sweeper) = (Memory::new(10), Sweeper::new());
    sweeper.resize(10);
    assert_eq!(sweep(&mut sweeper, &mut memory, 35), []);
    assert_eq!((sweeper.step(), sweeper.checked()), (4, 25));
}

#[test]
fn lost_stale_torn_and_misplaced_pages_are_told_apart() {
    let (mut memory, mut sweeper) = (Memory::new(10), Sweeper::new());
    sweeper.resize(10);
    sweep(&mut sweeper, &mut memory, 10);
    let old = memory.0.clone();
    sweep(&mut sweeper, &mut memory, 10);
    memory.0[1] = [0; WORDS];
    memory.0[3] = old[3];
    memory.0[5][WORDS / 2..].copy_from_slice(&old[5][WORDS / 2..]);
    memory.0[7] = memory.0[8];
    memory.0[9][WORDS - 1] ^= 1 << 40;
    let found = sweep(&mut sweeper, &mut memory, 10);
    let frame = |index: u64| FIRST_FRAME + index;
    assert_eq!(
        found,
        [
            (frame(1), Defect::Lost),
            (frame(3), Defect::Stale),
            (frame(5), Defect::Torn),
            (frame(7), Defect::Stale),
            (frame(9), Defect::Torn)
        ]
    );
    assert_eq!(sweep(&mut sweeper, &mut memory, 10), [], "a counted defect is repaired");
    assert_eq!(sweeper.defects().total(), 5);
}

proptest! {
    #[test]
    fn resizing_forgets_nothing_and_invents_nothing(
        changes in proptest::collection::vec((0_u64..40, 0_usize..60), 1..20), damaged in 0_usize..40
    ) {
        let (mut memory, mut sweeper) = (Memory::new(40), Sweeper::new());
        for (size, pages) in changes {
            sweeper.resize(size);
            prop_assert_eq!(sweep(&mut sweeper, &mut memory, pages), []);
        }
        sweeper.resize(40);
        prop_assert_eq!(sweep(&mut sweeper, &mut memory, 80), []);
        memory.0[damaged][0] += 1;
        prop_assert_eq!(sweep(&mut sweeper, &mut memory, 40).len(), 1);
    }

    #[test]
    fn one_changed_bit_of_a_record_is_seen(step in 1_u64.., frame in any::<u64>(), record in 0_usize..3, bit in 0_usize..192) {
        let mut page = [0; WORDS];
        page::write(&mut page, frame, step);
        prop_assert_eq!(page::check(&page, frame, step), Ok(()));
        page[[0, 254, 509][record] + bit / 64] ^= 1 << (bit % 64);
        prop_assert!(page::check(&page, frame, step).is_err());
    }

    #[test]
    fn one_changed_bit_of_a_filled_page_is_seen(frame in 0_u64..1 << 40, bit in 0_usize..WORDS * 64) {
        let mut page = [0; WORDS];
        fill::write(&mut page, frame);
        prop_assert!(fill::check(&page, frame) && page.iter().all(|&word| word != 0));
        page[bit / 64] ^= 1 << (bit % 64);
        prop_assert!(!fill::check(&page, frame));
    }

    #[test]
    fn one_changed_bit_of_a_block_is_seen(sequence in 1_u64.., address in any::<u64>(), bit in 0_usize..block::BYTES * 8) {
        let mut data = [0; block::BYTES];
        block::write(&mut data, sequence, address);
        prop_assert_eq!(block::check(&data, sequence, address), Ok(()));
        prop_assert_eq!(block::check(&data, sequence, address ^ 1), Err(Defect::Stale));
        data[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(block::check(&data, sequence, address).is_err());
    }
}

/// A disk that completes requests in any order, and may do one write wrongly.
#[derive(Default)]
struct Disk {
    chunks: HashMap<usize, Vec<u8>>,
    queue: Vec<(Job, Vec<u8>)>,
    fault: Option<(u64, Fault)>,
    flushed: u64,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// The write never happens.
    Dropped,
    /// Only its first half happens.
    Half,
    /// It goes to the next chunk.
    Misplaced,
    /// The device reports an error.
    Refused,
}

impl Disk {
    fn submit(&mut self, job: Job) {
        let mut data = vec![0; CHUNK_BYTES];
        if let Job::Write { chunk, sequence } = job {
            verifier::fill(chunk, sequence, &mut data);
        }
        self.queue.push((job, data));
    }

    fn complete(&mut self, index: usize, verifier: &mut Verifier) {
        let (job, mut data) = self.queue.swap_remove(index % self.queue.len());
        let mut outcome = Ok(());
        match job {
            Job::Write { chunk, sequence } => match self.fault.filter(|fault| fault.0 == sequence) {
                None => drop(self.chunks.insert(chunk, data.clone())),
                Some((_, Fault::Dropped)) => {}
                Some((_, Fault::Half)) => {
                    let old = self.chunks.entry(chunk).or_insert_with(|| vec![0; CHUNK_BYTES]);
                    // In the middle of a block.
                    old[..CHUNK_BYTES / 2 + 512].copy_from_slice(&data[..CHUNK_BYTES / 2 + 512]);
                }
                Some((_, Fault::Misplaced)) => drop(self.chunks.insert(chunk + 1, data.clone())),
                Some((_, Fault::Refused)) => outcome = Err(()),
            },
            Job::CheckOld { chunk, .. } | Job::ReadBack { chunk, .. } => {
                data = self.chunks.get(&chunk).cloned().unwrap_or(data);
            }
            Job::Flush => {
                assert!(self.queue.is_empty(), "a flush is sent when all writes are over");
                self.flushed += 1;
            }
        }
        verifier.finish(job, outcome, &data);
    }

    /// Runs for so many completions, with up to eight requests in flight.
    fn run(&mut self, verifier: &mut Verifier, order: &[usize], completions: usize) {
        for step in 0..completions {
            while self.queue.len() < 8
                && let Some((job, _)) = verifier.next(true)
            {
                self.submit(job);
            }
            if self.queue.is_empty() {
                return;
            }
            self.complete(order[step % order.len()], verifier);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_good_disk_has_no_errors(
        order in proptest::collection::vec(0_usize..8, 1..50), sizes in proptest::collection::vec(0_usize..80, 1..4)
    ) {
        let (mut disk, mut verifier) = (Disk::default(), Verifier::new());
        for size in sizes {
            verifier.resize(size);
            disk.run(&mut verifier, &order, 300);
        }
        let counters = verifier.counters();
        prop_assert_eq!((counters.defects.total(), counters.io_errors), (0, 0));
        prop_assert_eq!(counters.flushes, disk.flushed);
    }

    #[test]
    fn a_bad_write_is_found(order in proptest::collection::vec(0_usize..8, 1..50), sequence in 41_u64..80, kind in 0_usize..3) {
        let (mut disk, mut verifier) = (Disk::default(), Verifier::new());
        disk.fault = Some((sequence, [Fault::Dropped, Fault::Half, Fault::Misplaced][kind]));
        verifier.resize(40);
        disk.run(&mut verifier, &order, 500);
        prop_assert!(verifier.counters().defects.total() > 0);
        prop_assert_eq!(verifier.counters().io_errors, 0);
    }
}

#[test]
fn a_refused_write_is_counted_once_and_the_work_goes_on() {
    let (mut disk, mut verifier) = (Disk::default(), Verifier::new());
    disk.fault = Some((17, Fault::Refused));
    verifier.resize(40);
    disk.run(&mut verifier, &[0], 1000);
    let counters = verifier.counters();
    assert_eq!((counters.io_errors, counters.defects.total()), (1, 0));
    assert!(counters.blocks_checked > 10 * CHUNK_BLOCKS && counters.sequence > 200);
}

#[test]
fn an_empty_area_has_no_jobs() {
    let mut verifier = Verifier::new();
    assert_eq!(verifier.next(true), None);
    verifier.resize(0);
    assert_eq!(verifier.next(true), None);
}
