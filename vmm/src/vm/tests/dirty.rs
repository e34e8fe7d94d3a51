//! Written pages are recorded, by the log and by rings.
//!
//! Most of the guests here write from ring 3. A KVM that emulates kernel code is refused dirty rings
//! ([`crate::vcpu::ring_probe`]), and what can be shown on it as well is that they are harvested rightly.

use migration::policy::{Limits, RoundStats};
use migration::throttle::raise;

use super::sweeper::{KERNEL, Work, put_to_work, written};
use super::*;
use crate::kvm::Host;
use crate::vcpu::ring_choice::RingRule;
use crate::vcpu::ring_probe;
use crate::vcpu::throttle::PERIOD;

/// Pages that are swept.
pub(super) const SWEPT: std::ops::Range<u64> = 0x400..0x3000;

/// Kernel code that increments a word in each page from 4 MiB to 48 MiB, for ever.
#[rustfmt::skip]
pub(super) const SWEEPER: [u8; 23] = [
    0xbe, 0x00, 0x00, 0x40, 0x00,       // mov esi, 0x400000
    0xff, 0x06,                         // inc dword [esi]
    0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, // add esi, 0x1000
    0x81, 0xfe, 0x00, 0x00, 0x00, 0x03, // cmp esi, 0x3000000
    0x72, 0xf0,                         // jb -16
    0xeb, 0xe9,                         // jmp -23
];

/// The kinds of tracking that this host has.
fn kinds(host: &Host) -> Vec<&'static str> {
    match host.capabilities().dirty_ring {
        Some(_) => vec!["log", "ring"],
        None => {
            eprintln!("dirty rings are not tested: this host's KVM has none");
            vec!["log"]
        }
    }
}

/// A machine whose rings have so many entries at most, trusted without a probe.
pub(super) fn tracked(
    kind: &str,
    code: &[u8],
    vcpus: u16,
    memory_mib: u64,
    most: u32,
) -> (tempfile::NamedTempFile, Machine) {
    let more = serde_json::json!({"dirty_tracking": kind, "memory_mib": memory_mib, "vcpus": vcpus});
    let (file, config) = config(code, &more);
    (file, Machine::boot_by(config, RingRule { fit: |_| Ok(()), most }).unwrap())
}

pub(super) fn collect(machine: &Machine) -> Bitmap {
    let mut pages = Bitmap::new(machine.memory().pages());
    machine.tracker().collect(&mut pages, machine.is_parked()).unwrap();
    pages
}

/// Waits until a page was written again, so many times.
pub(super) fn written_again(machine: &Machine, page: u64, times: u32) {
    let from = written(machine, page);
    until("a write", || written(machine, page) >= from + times);
}

#[test]
fn written_pages_are_recorded_exactly() {
    const PAGE: u64 = 0x400;
    let Some(host) = host_for_test("written_pages_are_recorded_exactly") else { return };
    let _turn = turn();
    for kind in kinds(&host) {
        let (_file, machine) = tracked(kind, &KERNEL, 1, 64, u32::MAX);
        put_to_work(&machine, &[Work::Sweep(PAGE..PAGE + 1, f64::INFINITY)]);
        machine.resume().unwrap();
        written_again(&machine, PAGE, 1);
        let mut pages = Bitmap::new(machine.memory().pages());
        assert!(machine.tracker().collect(&mut pages, false).is_err(), "{kind}: nothing is recorded yet");
        machine.tracker().start().unwrap();
        collect(&machine);
        until("a dirty page", || collect(&machine).contains(PAGE));
        machine.pause().unwrap();
        collect(&machine);
        assert!(collect(&machine).is_empty(), "{kind}: nothing can be written while it is paused");
        // A device writes: only vm-memory's bitmap sees it.
        machine.memory().ram().write_obj(1u32, GuestAddress(0x50_0000)).unwrap();
        assert_eq!(collect(&machine).next_run(0, 9), Some(0x500..0x501), "{kind}");
        // What was reported while it was paused must be reported again once it is written again.
        machine.resume().unwrap();
        written_again(&machine, PAGE, 1);
        machine.pause().unwrap();
        let pages = collect(&machine);
        assert_eq!((pages.count(), pages.contains(PAGE)), (1, true), "{kind}");
        machine.tracker().stop().unwrap();
        let mut wrong = Bitmap::new(3);
        assert!(machine.tracker().collect(&mut wrong, true).is_err());
        // And again, with nothing left over.
        machine.tracker().start().unwrap();
        assert!(collect(&machine).is_empty(), "{kind}");
        machine.resume().unwrap();
        written_again(&machine, PAGE, 1);
        machine.pause().unwrap();
        assert!(collect(&machine).contains(PAGE), "{kind}");
        assert_eq!(machine.tracker().warning(), None);
    }
}

/// A signal that cannot be held back came in a reset: what may be unprotected since then is protected again.
#[test]
fn a_reset_that_was_cut_short_costs_a_round_and_loses_nothing() {
    let Some(host) = host_for_test("a_reset_that_was_cut_short_costs_a_round_and_loses_nothing") else { return };
    if host.capabilities().dirty_ring.is_none() {
        eprintln!("skipped a_reset_that_was_cut_short_costs_a_round_and_loses_nothing: this host's KVM has no rings");
        return;
    }
    const PAGE: u64 = 0x400;
    let _turn = turn();
    let (_file, machine) = tracked("ring", &KERNEL, 1, 64, u32::MAX);
    put_to_work(&machine, &[Work::Sweep(PAGE..PAGE + 1, f64::INFINITY)]);
    machine.resume().unwrap();
    machine.tracker().start().unwrap();
    written_again(&machine, PAGE, 1);
    machine.tracker().cut_short();
    assert_eq!(collect(&machine).count(), machine.memory().pages());
    for _ in 0..3 {
        written_again(&machine, PAGE, 2);
        let pages = collect(&machine);
        assert_eq!((pages.count(), pages.contains(PAGE)), (1, true));
    }
    assert_eq!(machine.tracker().warning(), None);
}

/// What the guest has counted in each page; it is paused.
fn counted(machine: &Machine) -> Vec<u32> {
    SWEPT.map(|page| written(machine, page)).collect()
}

/// Every page whose content has changed between two collections was reported by the second one or by one in between.
fn nothing_is_missed(machine: &Machine, kind: &str) {
    let last = SWEPT.end - 1;
    machine.tracker().start().unwrap();
    let (mut before, mut seen) = (counted(machine), Bitmap::new(machine.memory().pages()));
    for round in 0..4 {
        machine.resume().unwrap();
        written_again(machine, last, 1);
        machine.tracker().collect(&mut seen, false).unwrap();
        written_again(machine, last, 2);
        machine.pause().unwrap();
        machine.tracker().collect(&mut seen, true).unwrap();
        let now = counted(machine);
        for ((page, before), now) in SWEPT.zip(&before).zip(&now) {
            assert!(before == now || seen.contains(page), "{kind}: round {round} misses page {page:#x}");
        }
        (before, seen) = (now, Bitmap::new(machine.memory().pages()));
    }
    machine.tracker().stop().unwrap();
    machine.resume().unwrap();
    written_again(machine, last, 2);
}

#[test]
fn no_written_page_is_missed_although_rings_are_full_all_the_time() {
    let Some(host) = host_for_test("no_written_page_is_missed_although_rings_are_full_all_the_time") else { return };
    let _turn = turn();
    for kind in kinds(&host) {
        // Fewer than the guest writes between two looks of the thread that harvests.
        let (_file, machine) = tracked(kind, &KERNEL, 1, 64, 1 << 10);
        put_to_work(&machine, &[Work::Sweep(SWEPT, f64::INFINITY)]);
        nothing_is_missed(&machine, kind);
        // Kicked all the time, also while it empties its ring.
        machine.throttle(&[30]).unwrap();
        nothing_is_missed(&machine, kind);
        eprintln!("{kind}: {} times full, {:?}", machine.parts.vcpus.ring_full_exits(), machine.tracker().warning());
        assert_eq!(machine.parts.vcpus.ring_full_exits() > 0, kind == "ring", "{kind}");
        assert_eq!(machine.tracker().warning(), None, "{kind}: of ring 3 code no entry is lost, wherever it runs");
    }
}

/// The kernel notes its own mistake in its log, once (`kvm_dirty_ring_push`): this runs only where it makes it.
#[test]
fn nothing_is_missed_when_entries_are_lost_and_the_vcpu_runs_on() {
    let Some(host) = host_for_test("nothing_is_missed_when_entries_are_lost_and_the_vcpu_runs_on") else { return };
    let _turn = turn();
    let unfit = host.capabilities().dirty_ring.and_then(|_| ring_probe::stops_in_time(&host).err());
    if unfit.is_none() {
        eprintln!("skipped nothing_is_missed_when_entries_are_lost_and_the_vcpu_runs_on: this host's KVM loses none");
        return;
    }
    let (_file, machine) = tracked("ring", &SWEEPER, 1, 64, 1 << 12);
    nothing_is_missed(&machine, "ring");
    let warning = machine.tracker().warning().expect("entries were lost");
    assert!(warning.contains("dirty_tracking"), "{warning}");
    assert_eq!(machine.tracker().vcpu_rates(), Vec::<f64>::new(), "nobody knows any more");
    // And in a further migration.
    machine.tracker().start().unwrap();
    written_again(&machine, SWEPT.end - 1, 2);
    for _ in 0..2 {
        assert_eq!(collect(&machine).count(), machine.memory().pages(), "everything, in each round");
    }
    machine.pause().unwrap();
    assert_eq!(collect(&machine).count(), machine.memory().pages());
}

#[test]
fn rings_tell_which_vcpu_writes_and_how_fast() {
    let Some(host) = host_for_test("rings_tell_which_vcpu_writes_and_how_fast") else { return };
    if host.capabilities().dirty_ring.is_none() {
        eprintln!("skipped rings_tell_which_vcpu_writes_and_how_fast: this host's KVM has none");
        return;
    }
    let _turn = turn();
    const SWEEPS: u32 = 10;
    let (_file, machine) = tracked("ring", &KERNEL, 2, 64, u32::MAX);
    put_to_work(&machine, &[Work::Spin, Work::Sweep(SWEPT, 100e6)]);
    let (last, swept_bytes) = (SWEPT.end - 1, ((SWEPT.end - SWEPT.start) * PAGE_BYTES) as f64);
    machine.resume().unwrap();
    machine.tracker().start().unwrap();
    written_again(&machine, last, 1);
    collect(&machine);
    // Not each round tells: who else has the processors may take them in the midst of it. The rate is that of the first sweep, in
    // which each page is written for the first time; what the log knows is a tenth of what was written.
    until("a round in which the rings know the rate, and the log would not", || {
        let start = Instant::now();
        written_again(&machine, last, 1);
        let first = swept_bytes / start.elapsed().as_secs_f64();
        written_again(&machine, last, SWEEPS - 1);
        let different = collect(&machine).count() as f64 * PAGE_BYTES as f64 / start.elapsed().as_secs_f64();
        let rates = machine.tracker().vcpu_rates();
        eprintln!("different pages {different:.2e} B/s, in the first sweep {first:.2e}; its rings say {rates:.0?}");
        assert_eq!(rates.len(), 2);
        // KVM itself may write a page now and then for a vCPU.
        assert!(rates[0] < rates[1] / 100.0 && rates[1] >= different * 0.9, "{rates:?}");
        rates[1] > different * 2.0 && rates[1] > first / 2.0 && rates[1] < first * 2.0
    });
}

/// Rings, policy and holds together: the other vCPU does not notice.
#[test]
fn only_the_vcpu_that_dirties_is_held() {
    let Some(host) = host_for_test("only_the_vcpu_that_dirties_is_held") else { return };
    if host.capabilities().dirty_ring.is_none() {
        eprintln!("skipped only_the_vcpu_that_dirties_is_held: this host's KVM has no rings");
        return;
    }
    let _turn = turn();
    let (_file, machine) = tracked("ring", &KERNEL, 2, 64, u32::MAX);
    put_to_work(&machine, &[Work::Spin, Work::Sweep(SWEPT, f64::INFINITY)]);
    machine.resume().unwrap();
    machine.tracker().start().unwrap();
    written_again(&machine, SWEPT.end - 1, 1);
    collect(&machine);
    let round = |percent: &[u8]| {
        let start = Instant::now();
        until("some periods", || start.elapsed() > PERIOD * 20);
        let dirty_pages = collect(&machine).count();
        let (elapsed, vcpu_dirty_bytes_per_second) = (start.elapsed(), machine.tracker().vcpu_rates());
        let throttle_percent = percent.to_vec();
        RoundStats { elapsed, dirty_pages, throttle_percent, vcpu_dirty_bytes_per_second, ..RoundStats::default() }
    };
    let mut free = round(&[0, 0]);
    // A link that carries a quarter of what it dirties.
    free.memory_bytes_per_second = Some(free.dirty_bytes_per_second() / 4.0);
    let limits = Limits { throttle_max_percent: 99, ..Limits::default() };
    let percent = raise(&free, &limits).expect("it does not converge");
    eprintln!("{:.0?} B/s: held for {percent:?} % of the time", free.vcpu_dirty_bytes_per_second);
    assert!(percent[0] == 0 && percent[1] >= 87, "{percent:?}");
    machine.throttle(&percent).unwrap();
    until("a hold", || machine.held()[1] > PERIOD * 10);
    assert!(machine.held()[0].is_zero(), "{:?}", machine.held());
    let now = round(&percent).vcpu_dirty_bytes_per_second;
    assert!(now[0] < now[1], "{now:?}");
}
