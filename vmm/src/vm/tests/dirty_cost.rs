//! What the dirty log and dirty rings cost: the guest, while it runs, and whoever collects.
//!
//! `cargo test --release -p vmm --lib measured_log_against_ring -- --ignored --nocapture` prints the table of
//! `docs/design/0007-dirty-rings.md`.

use super::dirty::{collect, tracked, written_again};
use super::sweeper::{KERNEL, Work, put_to_work, written};
use super::*;

const MEMORY_MIB: u64 = 512;
const FIRST: u64 = 0x400;
const MIB: f64 = (1 << 20) as f64;
const ROUND: Duration = Duration::from_millis(250);
const ROUNDS: usize = 16;

/// Medians over rounds, times in milliseconds.
struct Cost {
    mib_per_second: f64,
    pages: u64,
    running_ms: f64,
    paused_ms: f64,
    resume_ms: f64,
    full: u64,
}

fn median<T: Copy + PartialOrd>(mut values: Vec<T>) -> T {
    values.sort_by(|a, b| a.partial_cmp(b).unwrap());
    values[values.len() / 2]
}

fn timed<T>(action: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let value = action();
    (value, start.elapsed().as_secs_f64() * 1e3)
}

/// A guest that writes this working set at this rate, in rounds: run, collect, run, pause, collect.
fn cost(kind: &str, set_mib: u64, mib_per_second: f64) -> Cost {
    let (_file, machine) = tracked(kind, &KERNEL, 1, MEMORY_MIB, u32::MAX);
    let pages = set_mib << 8;
    let (last, set) = (FIRST + pages - 1, FIRST..FIRST + pages);
    put_to_work(&machine, &[Work::Sweep(set.clone(), mib_per_second * MIB)]);
    machine.resume().unwrap();
    written_again(&machine, last, 2);
    machine.tracker().start().unwrap();
    let (mut rates, mut found) = (Vec::new(), Vec::new());
    let (mut running, mut paused, mut resumed) = (Vec::new(), Vec::new(), Vec::new());
    let count = || set.clone().map(|page| u64::from(written(&machine, page))).sum::<u64>();
    let round = || {
        let start = Instant::now();
        until("the end of a round", || {
            std::thread::sleep(Duration::from_millis(1));
            start.elapsed() >= ROUND
        });
    };
    for _ in 0..ROUNDS {
        // Counted while it stands: the guest gets all of this time.
        let (before, start) = (count(), Instant::now());
        resumed.push(timed(|| machine.resume().unwrap()).1);
        round();
        let (dirty, ms) = timed(|| collect(&machine));
        running.push(ms);
        found.push(dirty.count());
        round();
        machine.pause().unwrap();
        let seconds = start.elapsed().as_secs_f64();
        paused.push(timed(|| collect(&machine)).1);
        rates.push((count() - before) as f64 / 256.0 / seconds);
    }
    assert_eq!(machine.tracker().warning(), None);
    Cost {
        mib_per_second: median(rates),
        pages: median(found),
        running_ms: median(running),
        paused_ms: median(paused),
        resume_ms: median(resumed),
        full: machine.parts.vcpus.ring_full_exits(),
    }
}

#[test]
#[ignore = "a measurement of two minutes, for a quiet machine"]
fn measured_log_against_ring() {
    let Some(host) = host_for_test("measured_log_against_ring") else { return };
    if host.capabilities().dirty_ring.is_none() {
        eprintln!("skipped measured_log_against_ring: this host's KVM has no rings");
        return;
    }
    println!(
        "| guest writes | by | it gets MiB/s | pages a round | collect, running | collect, paused | resume | ring full |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for (set_mib, rate) in [(100, 100.0), (400, 512.0), (400, f64::INFINITY)] {
        for kind in ["log", "ring", "log", "ring"] {
            let cost = cost(kind, set_mib, rate);
            println!(
                "| {rate} MiB/s of {set_mib} MiB | {kind} | {:.0} | {} | {:.2} ms | {:.2} ms | {:.2} ms | {} |",
                cost.mib_per_second, cost.pages, cost.running_ms, cost.paused_ms, cost.resume_ms, cost.full
            );
        }
    }
}
