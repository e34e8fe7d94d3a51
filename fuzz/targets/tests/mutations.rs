//! Every target over mutations of its seeds, on any toolchain. The same inputs each time, so that what fails once fails again;
//! `HEADROOM_FUZZ_SECONDS=60` goes on with others for so long a target.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fuzz_targets::{TARGETS, Target};

/// Longest input.
const LONGEST: usize = 8 << 10;

fn corpus(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(target.name)
}

fn seeds(target: &Target) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(corpus(target)).expect("a corpus").map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// xorshift64* (Vigna 2016).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Values at which things go wrong.
const EDGES: [u64; 12] =
    [0, 1, 7, 0x7f, 0x80, 0xff, 0x1000, 0xffff, 0x7fff_ffff, 0xffff_ffff, 0x7fff_ffff_ffff_ffff, u64::MAX];

fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let at = random.below(input.len() + 1);
    let length = 1 + random.below(8);
    match random.below(8) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = random.next() as u8,
        2 => {
            let edge = EDGES[random.below(EDGES.len())].to_le_bytes();
            let width = [1, 2, 4, 8][random.below(4)].min(input.len() - at.min(input.len()));
            input[at..at + width].copy_from_slice(&edge[..width]);
        }
        3 => drop(input.splice(at..at, (0..length).map(|_| random.next() as u8))),
        4 => drop(input.drain(at..(at + length).min(input.len()))),
        5 => input.truncate(at),
        // A piece of its own, again.
        6 => {
            let piece = input[at..(at + 4 * length).min(input.len())].to_vec();
            drop(input.splice(at..at, piece));
        }
        // The rest of another seed.
        _ => {
            input.truncate(at);
            input.extend_from_slice(&other[random.below(other.len() + 1)..]);
        }
    }
    input.truncate(LONGEST);
}

fn survive(target: &Target, input: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| (target.run)(input))).is_err() {
        let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
        panic!("{} does not survive these {} bytes: {hex}", target.name, input.len());
    }
}

#[test]
fn nothing_from_outside_panics() {
    let seconds = std::env::var("HEADROOM_FUZZ_SECONDS").ok().map(|text| text.parse().expect("a number of seconds"));
    for target in &TARGETS {
        let seeds = seeds(target);
        assert!(!seeds.is_empty(), "{} has no seeds", target.name);
        seeds.iter().for_each(|seed| survive(target, seed));
        let start = Instant::now();
        let (mut rounds, mut random) = (0, Random(0x9e37_79b9_7f4a_7c15));
        let until = seconds.map(Duration::from_secs);
        while until.map_or(rounds < target.rounds, |until| start.elapsed() < until) {
            let mut input = seeds[random.below(seeds.len())].clone();
            for _ in 0..1 + random.below(6) {
                let other = random.below(seeds.len());
                mutate(&mut input, &seeds[other], &mut random);
            }
            survive(target, &input);
            rounds += 1;
        }
        println!("{}: {rounds} inputs in {:?}", target.name, start.elapsed());
    }
}
