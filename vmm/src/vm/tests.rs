//! Machines of a few instructions: run, pause, save, restore, run on.

mod dirty;
mod dirty_cost;
mod moved;
mod sweeper;
mod throttle;

use std::io::Write;
use std::time::{Duration, Instant};

use migration::guest::{PAGE_BYTES, StatePayload};
use migration::page::Bitmap;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::boot::testing::kernel;
use crate::device::BusDevice;
use crate::device::state::StateError;
use crate::kvm::capability::host_for_test;

/// Where [`COUNTER`] counts.
const COUNT: u64 = 0x30_0000;

/// Counts for ever, with values in registers that nothing touches.
#[rustfmt::skip]
const COUNTER: [u8; 24] = [
    0xbb, 0x78, 0x56, 0x34, 0x12,       // mov ebx, 0x12345678
    0xbf, 0xef, 0xbe, 0xad, 0xde,       // mov edi, 0xdeadbeef
    0xbe, 0x00, 0x00, 0x30, 0x00,       // mov esi, COUNT
    0x0f, 0x31,                         // rdtsc, to have an instruction that takes time
    0xff, 0x06,                         // inc dword [esi]
    0xeb, 0xfa,                         // jmp -6
    0x90, 0x90, 0x90,
];

fn config(code: &[u8], more: &serde_json::Value) -> (tempfile::NamedTempFile, MachineConfig) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&kernel(code)).unwrap();
    let mut config = serde_json::json!({"name": "test", "memory_mib": 16, "kernel": file.path()});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    (file, serde_json::from_value(config).unwrap())
}

fn counter() -> (tempfile::NamedTempFile, Machine) {
    let (file, config) = config(&COUNTER, &serde_json::json!({}));
    (file, Machine::boot(config).unwrap())
}

/// Tests that measure, or keep all processors busy, come one after the other.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    lock(&TURN)
}

fn count(machine: &Machine) -> u32 {
    machine.memory().ram().read_obj(GuestAddress(COUNT)).unwrap()
}

fn until(what: &str, mut check: impl FnMut() -> bool) {
    let start = Instant::now();
    while !check() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what} did not happen");
        std::thread::yield_now();
    }
}

fn counts_on(machine: &Machine) {
    let before = count(machine);
    until("counting", || count(machine) > before);
}

fn copy_memory(from: &Machine, to: &Machine) {
    let mut next = 0;
    while let Some(run) = from.memory().next_populated(next).unwrap() {
        let mut pages = vec![0; ((run.end - run.start) * PAGE_BYTES) as usize];
        from.memory().read_pages(run.start, &mut pages).unwrap();
        to.memory().write_pages(run.start, &pages).unwrap();
        next = run.end;
    }
}

fn bytes<'a>(payloads: &'a [StatePayload], name: &str) -> &'a [u8] {
    &payloads.iter().find(|payload| payload.slot.name == name).unwrap().bytes
}

#[test]
fn pausing_stops_and_resuming_goes_on() {
    if host_for_test("pausing_stops_and_resuming_goes_on").is_none() {
        return;
    }
    let (_file, machine) = counter();
    assert_eq!(machine.state(), MachineState::Paused);
    assert_eq!(machine.first_entry(), None);
    machine.resume().unwrap();
    counts_on(&machine);
    for _ in 0..50 {
        machine.pause().unwrap();
        let stopped = count(&machine);
        std::thread::sleep(Duration::from_micros(200));
        assert_eq!(count(&machine), stopped);
        machine.resume().unwrap();
        counts_on(&machine);
    }
    machine.pause().unwrap();
    machine.fence().unwrap();
    assert!(matches!(machine.resume(), Err(MachineError::State { state: MachineState::Fenced, .. })));
    machine.unfence().unwrap();
    machine.resume().unwrap();
    counts_on(&machine);
}

#[test]
fn a_restored_machine_is_the_same_and_runs_on() {
    if host_for_test("a_restored_machine_is_the_same_and_runs_on").is_none() {
        return;
    }
    let (_file, first) = counter();
    first.resume().unwrap();
    counts_on(&first);
    assert!(first.save_state().is_err(), "a running machine must not be saved");
    first.pause().unwrap();
    let saved = first.save_state().unwrap();

    let second = Machine::incoming(first.config().clone(), first.profile()).unwrap();
    assert_eq!(second.state(), MachineState::Incoming);
    assert!(second.resume().is_err(), "an empty machine must not run");
    copy_memory(&first, &second);
    second.restore_state(&saved, true).unwrap();
    assert_eq!(second.digest().unwrap(), first.digest().unwrap());
    let again = second.save_state().unwrap();
    assert_eq!(bytes(&again, "serial"), bytes(&saved, "serial"));
    state::tests::same_vcpu(bytes(&saved, "vcpu/0"), bytes(&again, "vcpu/0"));
    state::tests::same_irqchip(bytes(&saved, "irqchip"), bytes(&again, "irqchip"));

    let stopped = count(&second);
    second.resume().unwrap();
    counts_on(&second);
    assert_eq!(count(&first), stopped);
    assert!(second.restore_state(&saved, true).is_err(), "restored twice");
}

#[test]
fn two_vcpus_travel_although_one_never_started() {
    if host_for_test("two_vcpus_travel_although_one_never_started").is_none() {
        return;
    }
    let (_file, config) = config(&COUNTER, &serde_json::json!({"vcpus": 2}));
    let first = Machine::boot(config).unwrap();
    first.resume().unwrap();
    counts_on(&first);
    first.pause().unwrap();
    let saved = first.save_state().unwrap();
    let second = Machine::incoming(first.config().clone(), first.profile()).unwrap();
    copy_memory(&first, &second);
    second.restore_state(&saved, true).unwrap();
    second.resume().unwrap();
    counts_on(&second);
    second.pause().unwrap();
    assert_eq!(second.slots(), first.slots());
}

#[test]
fn damaged_states_are_refused() {
    if host_for_test("damaged_states_are_refused").is_none() {
        return;
    }
    let (_file, first) = counter();
    let saved = first.save_state().unwrap();
    let restore = |payloads: &[StatePayload]| {
        let machine = Machine::incoming(first.config().clone(), first.profile()).unwrap();
        machine.restore_state(payloads, true).unwrap_err()
    };
    for index in 0..saved.len() {
        let mut fewer = saved.clone();
        let missing = fewer.remove(index).slot.name;
        // Builds before the keyboard have none.
        if missing != "keyboard" {
            assert!(matches!(restore(&fewer), StateFailure::Missing(name) if name == missing));
        }
        let mut cut = saved.clone();
        let half = cut[index].bytes.len() / 2;
        cut[index].bytes.truncate(half);
        assert!(matches!(restore(&cut), StateFailure::Payload(StateError::Decode { .. })));
        let mut newer = saved.clone();
        newer[index].slot.version = 77;
        assert!(matches!(restore(&newer), StateFailure::Payload(StateError::Version { found: 77, .. })));
    }
    let mut more = saved.clone();
    more.push(StatePayload { slot: migration::guest::DeviceSlot { name: "gpu".into(), version: 1 }, bytes: vec![] });
    assert!(matches!(restore(&more), StateFailure::Surplus(name) if name == "gpu"));
}

#[test]
fn a_machine_that_stops_by_itself_says_why() {
    if host_for_test("a_machine_that_stops_by_itself_says_why").is_none() {
        return;
    }
    // mov al, 0xfe; out 0x64, al; hlt. The other one has no interrupt table: ud2 ends in a triple fault.
    for (code, reason) in [(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4][..], "reset"), (&[0x0f, 0x0b][..], "triple fault")] {
        let (_file, config) = config(code, &serde_json::json!({}));
        let machine = Machine::boot(config).unwrap();
        machine.resume().unwrap();
        until("the stop", || machine.state() == MachineState::Stopped);
        assert!(machine.stop_reason().unwrap().to_string().contains(reason));
        assert!(matches!(machine.pause(), Err(MachineError::Stopped(_))), "a migration must not take it along");
        assert!(matches!(machine.resume(), Err(MachineError::State { state: MachineState::Stopped, .. })));
    }
}

/// A fault of ours, which no guest should be able to cause; the process must stay usable.
struct Faulty;

impl BusDevice for Faulty {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, _: u64, _: &[u8]) {
        panic!("a register that panics, as asked for by the test");
    }
}

#[test]
fn a_vcpu_thread_that_panics_stops_the_machine_and_nobody_waits_for_it() {
    if host_for_test("a_vcpu_thread_that_panics_stops_the_machine_and_nobody_waits_for_it").is_none() {
        return;
    }
    // out 0x99, al; jmp -2
    let (_file, config) = config(&[0xe6, 0x99, 0xeb, 0xfe], &serde_json::json!({"vcpus": 2}));
    let machine = Machine::boot(config).unwrap();
    machine.parts.bus.insert_ports(0x99..0x9a, Arc::new(Mutex::new(Faulty))).unwrap();
    machine.resume().unwrap();
    until("the stop", || machine.state() == MachineState::Stopped);
    assert!(machine.stop_reason().unwrap().to_string().contains("panicked"));
    assert!(matches!(machine.pause(), Err(MachineError::Stopped(_))));
    // Joins all threads.
    drop(machine);
}

/// Switches the keyboard on, and resets the machine once Del is down.
#[rustfmt::skip]
const LISTENER: [u8; 25] = [
    0xb0, 0x60, 0xe6, 0x64,             // mov al, 0x60; out 0x64, al: the control byte follows
    0xb0, 0x41, 0xe6, 0x60,             // mov al, 0x41; out 0x60, al: interrupts, translated
    0xe4, 0x64, 0xa8, 0x01, 0x74, 0xfa, // in al, 0x64; test al, 1; jz back
    0xe4, 0x60, 0x3c, 0x53, 0x75, 0xf4, // in al, 0x60; cmp al, 0x53; jne back
    0xb0, 0xfe, 0xe6, 0x64, 0xf4,       // mov al, 0xfe; out 0x64, al; hlt
];

#[test]
fn a_guest_is_asked_to_shut_down_also_where_it_has_moved() {
    if host_for_test("a_guest_is_asked_to_shut_down_also_where_it_has_moved").is_none() {
        return;
    }
    let (_file, config) = config(&LISTENER, &serde_json::json!({}));
    let first = Machine::boot(config).unwrap();
    let refused = first.ask_to_shut_down();
    assert!(matches!(refused, Err(MachineError::State { state: MachineState::Paused, .. })));
    first.resume().unwrap();
    until("listening", || first.parts.keyboard.listens());
    first.pause().unwrap();
    let mut saved = first.save_state().unwrap();
    let restored = |saved: &[StatePayload]| {
        let machine = Machine::incoming(first.config().clone(), first.profile()).unwrap();
        copy_memory(&first, &machine);
        machine.restore_state(saved, true).unwrap();
        machine.resume().unwrap();
        machine
    };
    let second = restored(&saved);
    second.ask_to_shut_down().unwrap();
    until("the stop", || second.state() == MachineState::Stopped);
    assert!(second.stop_reason().unwrap().to_string().contains("reset"));
    // It came from a build that had no keyboard.
    saved.retain(|payload| payload.slot.name != "keyboard");
    assert!(matches!(restored(&saved).ask_to_shut_down(), Err(MachineError::Deaf)));
}

#[test]
fn a_processor_that_is_not_here_is_refused() {
    if host_for_test("a_processor_that_is_not_here_is_refused").is_none() {
        return;
    }
    let (_file, first) = counter();
    let mut wanted = first.profile().clone();
    let leaf = wanted.leaves.iter_mut().find(|leaf| leaf[0] == 1).unwrap();
    leaf[5] |= 1 << 30; // ia64: no host has it.
    let Err(error) = Machine::incoming(first.config().clone(), &wanted) else { panic!("it was built") };
    assert!(error.to_string().contains("ia64 (CPUID 0x1.0 EDX bit 30)"), "{error}");
}
