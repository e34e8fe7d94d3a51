//! The planner from measurements to a decision, without hosts.

use super::*;
use crate::api::types::{EventTarget, MachineSummary, MigrationLimits, PlanOutcome};
use migration::report::TriggerKind;

fn config(change: impl FnOnce(&mut serde_json::Value)) -> HostConfig {
    let mut json = serde_json::json!({"host": "a1", "pool": "a", "run_dir": "/r", "state_dir": "/s", "socket": "/r/s",
        "listen": "10.1.0.1:7420", "migration_address": "10.1.0.1", "tls": {"ca": "/c", "certificate": "/c", "key": "/k"},
        "planner": {"horizon_s": 30.0, "cooldown_s": 60.0},
        "peers": [{"host": "a2", "pool": "a", "address": "10.1.0.2:7420"}, {"host": "b1", "pool": "b", "address": "10.1.0.3:7420"}]});
    change(&mut json);
    serde_json::from_value(json).unwrap()
}

fn planner(change: impl FnOnce(&mut serde_json::Value)) -> Planner {
    Planner::new(&config(change)).unwrap()
}

fn machine(name: &str, cpu_cores: f64, status: MachineStatus) -> MachineSummary {
    let usage = Usage { cpu_cores, cpu_demand_cores: cpu_cores, memory_mib: 64.0, ..Usage::default() };
    MachineSummary {
        name: name.into(),
        status,
        vcpus: 1,
        memory_mib: 128,
        disk_bytes: 0,
        disk_allocated_bytes: 0,
        limits: MigrationLimits::default(),
        usage: Some(usage),
        dirty: None,
    }
}

fn host(name: &str, cpu_cores: f64, machines: Vec<MachineSummary>) -> HostSummary {
    let usages: Vec<Usage> = machines.iter().filter_map(|machine| machine.usage).collect();
    let capacity =
        Capacity { cpu_cores, memory_mib: 4096.0, disk_bytes_per_second: 5e8, network_bytes_per_second: 1e9 };
    HostSummary {
        host: name.into(),
        live: true,
        draining: false,
        capacity,
        usage: Some(sum(usages.iter())),
        machines,
        sampled_unix_ms: 0,
    }
}

fn pools(a: Vec<HostSummary>, b: Vec<HostSummary>) -> Vec<PoolState> {
    vec![
        PoolState { pool: "a".into(), hosts: a, leader: Some("a1".into()) },
        PoolState { pool: "b".into(), hosts: b, leader: Some("b1".into()) },
    ]
}

/// Pool `a` of two cores with three machines of which `vm2` uses `load`; pool `b` of two idle cores.
fn loaded(load: f64) -> Vec<PoolState> {
    let running = MachineStatus::Running;
    let a1 = host("a1", 1.0, vec![machine("vm1", 0.3, running), machine("vm2", load, running)]);
    let a2 = host("a2", 1.0, vec![machine("vm3", 0.3, running)]);
    pools(vec![a1, a2], vec![host("b1", 2.0, vec![machine("vm9", 0.1, running)])])
}

/// Ticks until there is a decision or `steps` are over; `load` of a step is given to `loaded`.
fn run(planner: &mut Planner, steps: usize, events: &[Event], load: impl Fn(usize) -> f64) -> Option<(usize, Chosen)> {
    for step in 0..steps {
        planner.tick(loaded(load(step)), events).unwrap();
        if let Some(Ok(chosen)) = planner.decide("plan-1", events) {
            return Some((step, chosen));
        }
    }
    None
}

#[test]
fn a_quiet_pool_is_left_alone() {
    let mut planner = planner(|_| ());
    assert!(run(&mut planner, 120, &[], |step| 0.3 + 0.02 * (step % 3) as f64).is_none());
    let views = planner.views();
    assert_eq!(views.len(), 2);
    assert!(views[0].score.unwrap() < 0.25, "{:?}", views[0].score);
    assert!(!views[0].forecasts.is_empty() && !planner.machine_forecasts().is_empty());
}

#[test]
fn a_ramp_is_answered_before_the_pool_is_full() {
    let mut planner = planner(|_| ());
    // 0.9 of 1.9 usable cores until step 60, then 0.02 more each step: full at step 110.
    let load = |step: usize| 0.3 + 0.02 * step.saturating_sub(60) as f64;
    let (step, chosen) = run(&mut planner, 110, &[], load).expect("a decision before contention");
    assert!(step > 60, "not before there was anything to see: step {step}");
    assert_eq!((chosen.request.destination.as_str(), chosen.plan.outcome), ("b1", PlanOutcome::Started));
    assert_eq!(chosen.request.trigger.kind, TriggerKind::Forecast);
    assert!(chosen.plan.reasons.iter().any(|reason| reason.contains("cpu")), "{:?}", chosen.plan.reasons);
    assert!(chosen.plan.candidates.iter().any(|candidate| candidate.machine == chosen.machine));
    // Right after it there is no second one.
    assert!(run(&mut planner, 5, &[], |further| load(step + further)).is_none());
    assert_eq!(planner.views()[0].trigger.state, TriggerState::Cooldown);
}

#[test]
fn a_ramp_that_was_never_seen_is_answered_also_after_a_long_calm() {
    let mut planner = planner(|_| ());
    // Long enough for the past to be played on, and in it the load never rose.
    let load = |step: usize| 0.3 + 0.01 * (step % 3) as f64 + 0.02 * step.saturating_sub(400) as f64;
    let (step, chosen) = run(&mut planner, 450, &[], load).expect("a decision before contention");
    assert!(step > 400, "not before there was anything to see: step {step}");
    assert_eq!(chosen.plan.outcome, PlanOutcome::Started);
}

#[test]
fn a_declared_event_is_answered_before_any_load_is_seen() {
    let mut planner = planner(|_| ());
    let now = unix_ms();
    let event = Event {
        id: "evt-1".into(),
        name: "batch".into(),
        target: EventTarget::Machine("vm2".into()),
        starts_unix_ms: now + 20_000,
        ends_unix_ms: now + 60_000,
        repeats: None,
        adds: Usage { cpu_cores: 1.5, ..Usage::default() },
        confidence: 0.95,
        declared_at: "a1".into(),
    };
    let flat = |step: usize| 0.3 + 0.01 * (step % 2) as f64;
    assert!(run(&mut planner, 60, &[], flat).is_none());
    let (_, chosen) = run(&mut planner, 20, &[event], flat).expect("a decision for the event");
    assert_eq!(chosen.request.trigger.kind, TriggerKind::Event);
}

#[test]
fn a_cooldown_survives_a_restart() {
    let mut planner = planner(|_| ());
    let load = |step: usize| 0.3 + 0.02 * step.saturating_sub(60) as f64;
    let (_, mut chosen) = run(&mut planner, 110, &[], load).expect("a decision");
    chosen.plan.migration = Some("mig-1".into());
    let mut again = self::planner(|_| ());
    again.remember(&[chosen.plan]);
    assert!(run(&mut again, 110, &[], load).is_none());
}

#[test]
fn nobody_but_the_leader_acts_and_only_if_enabled() {
    let full = |_| 1.9;
    let mut other = planner(|json| json["host"] = "a2".into());
    assert!(run(&mut other, 60, &[], full).is_none());
    let mut disabled = planner(|json| json["planner"]["enabled"] = false.into());
    assert!(run(&mut disabled, 60, &[], full).is_none());
    assert!(disabled.views()[0].score.unwrap() > 0.9);
}

#[test]
fn without_room_elsewhere_the_plan_says_so_once() {
    let mut planner = planner(|_| ());
    let running = MachineStatus::Running;
    let mut refusals = Vec::new();
    for _ in 0..60 {
        let a = vec![host("a1", 1.0, vec![machine("vm1", 0.6, running), machine("vm2", 0.6, running)])];
        let b = vec![host("b1", 0.5, vec![machine("vm9", 0.45, running)])];
        planner.tick(pools(a, b), &[]).unwrap();
        match planner.decide("plan-1", &[]) {
            Some(Err(plan)) => refusals.push(plan),
            Some(Ok(chosen)) => panic!("moved {} to a full host", chosen.machine),
            None => {}
        }
    }
    assert_eq!(refusals.len(), 1, "one plan a cooldown");
    assert_eq!(refusals[0].outcome, PlanOutcome::NoAction);
    assert!(
        refusals[0].candidates.iter().any(|candidate| candidate.reason.contains("cpu")),
        "{:?}",
        refusals[0].candidates
    );
}

#[test]
fn a_machine_that_moved_takes_its_history_along_and_is_counted_once() {
    let mut planner = planner(|_| ());
    run(&mut planner, 50, &[], |_| 0.5);
    let running = MachineStatus::Running;
    let a = || vec![host("a1", 1.0, vec![machine("vm1", 0.3, running), machine("vm2", 0.5, MachineStatus::Migrating)])];
    let b = || vec![host("b1", 2.0, vec![machine("vm2", 0.5, MachineStatus::Incoming)])];
    planner.tick(pools(a(), b()), &[]).unwrap();
    assert_eq!(planner.pools.get("b").unwrap().machines().count(), 0, "it still counts where it comes from");
    let there = vec![host("b1", 2.0, vec![machine("vm2", 0.5, running)])];
    planner.tick(pools(vec![host("a1", 1.0, vec![machine("vm1", 0.3, running)])], there), &[]).unwrap();
    assert!(planner.pools.get("b").unwrap().history("vm2").unwrap().len() > 50, "its history came along");
    assert!(planner.pools.get("a").unwrap().history("vm2").is_none());
}

/// A batch on `vm2`, so many seconds from now: too much for pool `a`, and not for pool `b`.
fn batch(starts_in_s: u64) -> Event {
    let starts_unix_ms = unix_ms() + starts_in_s * 1000;
    Event {
        id: format!("evt-{starts_in_s}"),
        name: "batch".into(),
        target: EventTarget::Machine("vm2".into()),
        starts_unix_ms,
        ends_unix_ms: starts_unix_ms + 40_000,
        repeats: None,
        adds: Usage { cpu_cores: 1.3, ..Usage::default() },
        confidence: 0.95,
        declared_at: "a1".into(),
    }
}

#[test]
fn a_move_waits_for_its_latest_safe_start_and_is_dropped_if_it_is_not_needed() {
    let mut planner = planner(|json| json["planner"]["lead_s"] = 5.0.into());
    let flat = |step: usize| 0.3 + 0.01 * (step % 2) as f64;
    assert!(run(&mut planner, 60, &[], flat).is_none());
    // Decisions of 20 steps; the planner's clock stands still meanwhile.
    let decisions = |planner: &mut Planner, id: &str, events: &[Event]| {
        let step = |step| {
            planner.tick(loaded(flat(step)), events).unwrap();
            planner.decide(id, events)
        };
        (0..20).filter_map(step).collect::<Vec<_>>()
    };
    let waiting = decisions(&mut planner, "plan-1", &[batch(25)]);
    let [Err(plan)] = waiting.as_slice() else { panic!("one plan that waits, not {waiting:?}") };
    assert_eq!((plan.outcome, plan.destination.as_deref()), (PlanOutcome::Waiting, Some("b1")));
    assert!(plan.reasons.iter().any(|reason| reason.contains("waits for its latest safe start")), "{:?}", plan.reasons);
    let trigger = &planner.views()[0].trigger;
    let start = trigger.latest_start_unix_ms.unwrap();
    assert!(start > unix_ms() && start < unix_ms() + 20_000, "before the event, less move and reserve");
    assert_eq!(trigger.state, TriggerState::Planned);

    let dropped = decisions(&mut planner, "plan-2", &[]);
    let [Err(plan)] = dropped.as_slice() else { panic!("one plan that is dropped, not {dropped:?}") };
    assert_eq!((plan.id.as_str(), plan.outcome), ("plan-1", PlanOutcome::Dropped));
    assert!(plan.reasons.last().unwrap().contains("the score fell"), "{:?}", plan.reasons.last());

    assert_eq!(decisions(&mut planner, "plan-3", &[batch(25)]).len(), 1);
    let (_, chosen) = run(&mut planner, 5, &[batch(6)], flat).expect("a start in time");
    assert_eq!((chosen.plan.id.as_str(), chosen.plan.outcome), ("plan-3", PlanOutcome::Started));
    assert!(chosen.plan.reasons.last().unwrap().starts_with("starts now"), "{:?}", chosen.plan.reasons);
}

#[test]
fn forecasts_go_on_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = crate::store::Store::open(&folder.path().join("s.redb")).unwrap();
    let config = config(|_| ());
    let mut before = Planner::new(&config).unwrap();
    let (now, steps) = (unix_ms(), 120);
    for step in 0..steps {
        let states = loaded(0.4 + 0.05 * (step % 7) as f64);
        let measured = states.iter().flat_map(PoolState::measured);
        let samples: Vec<_> = measured.map(|(name, usage)| (format!("{}{name}", history::PREFIX), usage)).collect();
        store.add_samples(now - (steps - step) as u64 * 1000, &samples, step + 1 == steps).unwrap();
        before.tick(states, &[]).unwrap();
    }
    let mut after = Planner::new(&config).unwrap();
    after.recall(History::load(&store, &config, now).unwrap());
    for planner in [&mut before, &mut after] {
        planner.tick(loaded(0.5), &[]).unwrap();
    }
    for machine in ["vm1", "vm2", "vm3"] {
        assert!(after.pools.get("a").unwrap().history(machine).unwrap().len() >= steps, "{machine} starts cold");
    }
    let upper = |planner: &Planner| planner.expected_demand("vm2", Resource::Cpu).unwrap();
    let (known, replayed) = (upper(&before), upper(&after));
    assert!((known - replayed).abs() < 0.1 * known, "{replayed} instead of {known}");
    let score = |planner: &Planner| planner.views()[0].score.unwrap();
    assert!((score(&before) - score(&after)).abs() < 0.1, "{} and {}", score(&before), score(&after));
}

#[test]
fn a_host_says_what_its_own_forecast_has_against_a_machine() {
    let mut planner = planner(|json| {
        json["host"] = "b1".into();
        json["pool"] = "b".into();
    });
    assert!(planner.concern("vm7", None).is_none(), "nothing is known yet");
    run(&mut planner, 60, &[], |_| 0.5);
    let usage = |cores| Usage { cpu_cores: cores, cpu_demand_cores: cores, ..Usage::default() };
    assert_eq!(planner.concern("vm7", Some(&usage(0.5))), None);
    let concern = planner.concern("vm7", Some(&usage(1.9))).unwrap();
    assert!(concern.contains("host `b1`") && concern.contains("1.80 cores"), "{concern}");
}

#[test]
fn a_refused_move_starts_no_cooldown_and_is_not_repeated_at_once() {
    let mut planner = planner(|_| ());
    let load = |step: usize| 0.3 + 0.02 * step.saturating_sub(60) as f64;
    let (step, chosen) = run(&mut planner, 110, &[], load).expect("a decision");
    assert!(planner.trigger.cooldown_left(planner.now_s()) > 50.0);
    planner.refused(&chosen);
    assert_eq!(planner.trigger.cooldown_left(planner.now_s()), 0.0, "nothing has moved");
    planner.tick(loaded(load(step + 1)), &[]).unwrap();
    match planner.decide("plan-2", &[]) {
        Some(Ok(other)) => assert_ne!(other.machine, chosen.machine, "another machine may go there"),
        Some(Err(plan)) => {
            let said = plan.candidates.iter().any(|candidate| candidate.reason.contains("was refused there lately"));
            assert!(said, "{:?}", plan.candidates);
        }
        None => panic!("the trigger still fires"),
    }
}

#[test]
fn forecasts_that_are_always_wrong_give_way_to_a_threshold_that_says_so() {
    let mut planner = planner(|_| ());
    run(&mut planner, 60, &[], |_| 0.3);
    assert_eq!(planner.views()[0].fallback, None);
    // As if contention had been certain for a thousand windows and had never come.
    (0..30_000).for_each(|_| _ = planner.guard.step(1.0, 1.0, 0.5));
    assert!(run(&mut planner, 20, &[], |_| 0.3).is_none(), "a threshold sees nothing to do");
    let view = &planner.views()[0];
    assert!(view.fallback.as_ref().is_some_and(|why| why.contains("threshold")), "{view:?}");
    assert!(view.calibration_error.is_some_and(|error| error > 0.15));
    assert_eq!(planner.views()[1].fallback, None, "another pool's is not known here");
    // 0.3 + 0.3 + 1.5 of two cores is above the threshold: it acts now, and says why.
    let (_, chosen) = run(&mut planner, 20, &[], |_| 1.5).expect("a decision of the threshold");
    assert!(chosen.plan.reasons[0].contains("acting on the threshold"), "{:?}", chosen.plan.reasons);
}

#[test]
fn machines_that_will_lack_what_they_ask_for_are_named() {
    let mut planner = planner(|json| json["planner"]["enabled"] = false.into());
    run(&mut planner, 80, &[], |step| if step < 40 { 0.3 } else { 2.5 });
    let at_risk = &planner.views()[0].at_risk;
    assert_eq!(at_risk.first().map(|risk| risk.machine.as_str()), Some("vm2"), "{at_risk:?}");
    assert!(at_risk[0].probability > 0.5 && !at_risk[0].reason.is_empty(), "{at_risk:?}");
    assert!(at_risk.iter().all(|risk| risk.machine != "vm1"), "a small machine is served: {at_risk:?}");
    assert!(planner.views()[1].at_risk.is_empty());
}

mod capacity;
mod refit;

#[test]
fn what_a_machine_dirties_is_estimated_until_a_migration_has_shown_it() {
    let mut planner = planner(|_| ());
    let mut states = loaded(0.3);
    let estimate = DirtyEstimate { bytes_per_second: 2e8, working_set_bytes: Some(5e7), at_unix_ms: 1 };
    states[0].hosts[0].machines[1].dirty = Some(estimate);
    planner.tick(states.clone(), &[]).unwrap();
    let shapes = |planner: &Planner| -> Vec<(f64, f64)> {
        let machines = planner.machines(&states[0]);
        machines.iter().map(|machine| (machine.shape.dirty_bytes_per_second, machine.shape.working_set_bytes)).collect()
    };
    assert_eq!(shapes(&planner), [(0.0, 0.0), (2e8, 5e7), (0.0, 0.0)]);
    planner.observed.insert("vm2".into(), Observed { dirty_bytes_per_second: 1e6, working_set_bytes: 0.0 });
    assert_eq!(shapes(&planner), [(0.0, 0.0), (1e6, 0.0), (0.0, 0.0)]);
}

#[test]
fn machines_are_looked_at_once_their_pool_comes_near_contention() {
    let mut planner = planner(|_| ());
    assert!(!planner.near_contention(), "nothing is known");
    run(&mut planner, 60, &[], |step| 0.3 + 0.02 * (step % 3) as f64);
    assert!(!planner.near_contention(), "it is quiet");
    let near = (0..60).any(|step| {
        run(&mut planner, 1, &[], |_| 0.3 + 0.02 * f64::from(step));
        planner.near_contention()
    });
    assert!(near);
}
