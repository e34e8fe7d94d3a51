//! vCPUs that are held for a share of their time.

use super::*;
use crate::vcpu::throttle::PERIOD;

/// Of the time for which the vCPUs had a processor or were held, the share for which they were held, over some periods. What a
/// busy computer gives to others in between is no affair of the throttle.
fn held_share(machine: &Machine) -> f64 {
    let held = |machine: &Machine| machine.held().iter().sum::<Duration>();
    let (start, ran, waited) = (Instant::now(), machine.parts.vcpus.processor_time(), held(machine));
    until("some periods", || start.elapsed() > PERIOD * 100);
    let ran = (machine.parts.vcpus.processor_time() - ran).as_secs_f64();
    let held = (held(machine) - waited).as_secs_f64();
    held / (held + ran)
}

#[test]
fn a_throttled_vcpu_runs_that_much_less_and_then_as_before() {
    if host_for_test("a_throttled_vcpu_runs_that_much_less_and_then_as_before").is_none() {
        return;
    }
    let _turn = turn();
    let (_file, machine) = counter();
    machine.resume().unwrap();
    counts_on(&machine);
    machine.throttle(&[90]).unwrap();
    let held = held_share(&machine);
    // It may be woken late and run less, never much more.
    assert!(held > 0.85, "was held {held}");
    counts_on(&machine);

    machine.throttle(&[]).unwrap();
    counts_on(&machine);
    let held = machine.held();
    counts_on(&machine);
    assert_eq!((held_share(&machine), machine.held()), (0.0, held), "it is let go at once, and for good");
    machine.throttle(&[200]).unwrap();
    counts_on(&machine);
    assert!(machine.held()[0] > Duration::ZERO, "even then it runs a little");
}

/// Most of the time it is held, for up to 10 ms: a pause must not wait for that.
#[test]
fn a_held_vcpu_pauses_at_once() {
    if host_for_test("a_held_vcpu_pauses_at_once").is_none() {
        return;
    }
    let _turn = turn();
    let (_file, machine) = counter();
    machine.resume().unwrap();
    machine.throttle(&[99]).unwrap();
    let mut pauses: Vec<Duration> = (0..31)
        .map(|_| {
            counts_on(&machine);
            // It runs for 0.1 ms of 10: after 2 ms it is held, wherever it was.
            std::thread::sleep(PERIOD / 5);
            let start = Instant::now();
            machine.pause().unwrap();
            let time = start.elapsed();
            let stopped = count(&machine);
            std::thread::sleep(PERIOD * 2);
            assert_eq!(count(&machine), stopped, "a paused machine runs");
            machine.resume().unwrap();
            time
        })
        .collect();
    pauses.sort_unstable();
    assert!(pauses[15] < PERIOD / 4, "{pauses:?}");
    machine.pause().unwrap();
    let saved = machine.save_state().unwrap();

    // What is saved while throttling is in force knows nothing of it.
    let second = Machine::incoming(machine.config().clone(), machine.profile()).unwrap();
    copy_memory(&machine, &second);
    second.restore_state(&saved, true).unwrap();
    second.resume().unwrap();
    counts_on(&second);
    assert_eq!(second.held(), [Duration::ZERO]);
}

#[test]
fn a_held_machine_can_fail_and_end() {
    if host_for_test("a_held_machine_can_fail_and_end").is_none() {
        return;
    }
    let _turn = turn();
    let (_file, machine) = counter();
    machine.resume().unwrap();
    machine.throttle(&[99]).unwrap();
    until("a hold", || machine.held()[0] > Duration::ZERO);
    machine.fail("for a test");
    assert_eq!(machine.state(), MachineState::Stopped);
    assert!(matches!(machine.pause(), Err(MachineError::Stopped(_))), "its vCPU has parked");
    drop(machine);

    let (_file, machine) = counter();
    machine.resume().unwrap();
    machine.throttle(&[99]).unwrap();
    until("a hold", || machine.held()[0] > Duration::ZERO);
    let start = Instant::now();
    drop(machine);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn only_the_named_vcpu_is_held_and_an_idle_one_as_well() {
    if host_for_test("only_the_named_vcpu_is_held_and_an_idle_one_as_well").is_none() {
        return;
    }
    let _turn = turn();
    let (_file, config) = config(&COUNTER, &serde_json::json!({"vcpus": 2}));
    let machine = Machine::boot(config).unwrap();
    machine.resume().unwrap();
    machine.throttle(&[0, 50]).unwrap();
    // The second one waits for its startup interrupt all the time.
    until("a hold of the second", || machine.held()[1] > PERIOD);
    counts_on(&machine);
    assert_eq!(machine.held()[0], Duration::ZERO);
    machine.throttle(&[50]).unwrap();
    until("a hold of the first", || machine.held()[0] > PERIOD);
    let second = machine.held()[1];
    until("another", || machine.held()[0] > PERIOD * 4);
    assert_eq!(machine.held()[1], second);
}

/// Off and on again in quick succession: there is always exactly one who watches the clock.
#[test]
fn throttling_can_be_switched_all_the_time() {
    if host_for_test("throttling_can_be_switched_all_the_time").is_none() {
        return;
    }
    let _turn = turn();
    let (_file, machine) = counter();
    machine.resume().unwrap();
    for number in 0..200u8 {
        machine.throttle(&[number % 3 * 40]).unwrap();
        counts_on(&machine);
    }
    machine.throttle(&[80]).unwrap();
    let held = held_share(&machine);
    assert!((0.7..0.99).contains(&held), "{held}");
}
