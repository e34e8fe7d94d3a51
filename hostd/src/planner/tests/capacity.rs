//! Hosts that pools will need.

use super::*;
use crate::api::types::CapacityAdvice;

/// A tick is a hundred seconds: three of them are a step of the forecasts of a day.
fn planner_with(capacity: &serde_json::Value) -> Planner {
    planner(|json| {
        json["sample_interval_ms"] = 100_000.into();
        json["planner"] = serde_json::json!({"horizon_s": 1_000.0, "enabled": false, "capacity": capacity});
    })
}

fn live(planner: &mut Planner, ticks: usize, events: &[Event], load: impl Fn(usize) -> f64) {
    (0..ticks).for_each(|tick| planner.tick(loaded(load(tick)), events).unwrap());
}

fn of(planner: &Planner, pool: &str, risk: Option<f64>) -> crate::api::types::PoolCapacity {
    planner.capacities(risk).into_iter().find(|known| known.pool == pool).unwrap()
}

#[test]
fn needs_follow_use_risk_and_declared_events() {
    let mut planner = planner_with(&serde_json::json!({"lead_s": 600.0}));
    assert!(planner.capacities(None).is_empty(), "nothing was measured");
    // Two hosts of a core: 0.3 + 0.3 + about 0.2 of 0.95 usable cores each.
    live(&mut planner, 900, &[], |tick| 0.2 + 0.02 * ((tick / 3) % 5) as f64);
    let calm = of(&planner, "a", None);
    assert_eq!((calm.hosts, calm.risk, calm.per_host.cpu_cores), (2, 0.05, 1.0));
    assert_eq!(calm.needs.len(), 5);
    let within: Vec<f64> = calm.needs.iter().map(|need| need.within_s).collect();
    assert_eq!((within[0], within[4]), (300.0, 86_400.0));
    assert!(calm.needs.windows(2).all(|pair| pair[0].hosts <= pair[1].hosts));
    assert_eq!((calm.missing, calm.provision_within_s, calm.needs[0].hosts), (0, None, 1), "{calm:?}");
    let careful = of(&planner, "a", Some(0.001));
    assert!(careful.needs[4].use_at_risk >= calm.needs[4].use_at_risk && careful.risk == 0.001);
    // Every night at the same hour, four cores more: known long before it begins, and by the first window that holds it.
    let event = Event {
        repeats: Some("FREQ=DAILY".into()),
        adds: Usage { cpu_cores: 4.0, ..Usage::default() },
        ..batch(3 * 3_600)
    };
    live(&mut planner, 3, std::slice::from_ref(&event), |_| 0.2);
    let busy = of(&planner, "a", None);
    let hosts: Vec<usize> =
        busy.needs.iter().filter(|need| within.contains(&need.within_s)).map(|need| need.hosts).collect();
    assert!(hosts[0] <= 2 && hosts[2] >= 4, "{hosts:?}");
    assert!(busy.missing >= 2, "{busy:?}");
    let order = busy.provision_within_s.unwrap();
    assert!((3_600.0..3.0 * 3_600.0).contains(&order), "in time, less what it takes to get a host: {order}");
}

#[test]
fn a_superfluous_host_is_released_after_its_time_and_a_missing_one_ordered() {
    let mut planner = planner_with(&serde_json::json!({"hold_s": 0.0}));
    live(&mut planner, 900, &[], |_| 0.2);
    live(&mut planner, 3, &[], |_| 0.2);
    let calm = of(&planner, "a", None);
    assert_eq!(calm.advice, CapacityAdvice::Release, "{calm:?}");
    assert_eq!(of(&planner, "b", None).advice, CapacityAdvice::Keep, "a pool keeps one");
    let mut patient = planner_with(&serde_json::json!({"hold_s": 3_600.0}));
    live(&mut patient, 900, &[], |_| 0.2);
    let calm = of(&patient, "a", None);
    assert_eq!(calm.advice, CapacityAdvice::Keep);
    assert!(calm.reason.contains("released if it stays so"), "{}", calm.reason);
    // Load that asks for three hosts.
    live(&mut planner, 60, &[], |_| 2.0);
    let busy = of(&planner, "a", None);
    assert_eq!((busy.advice, busy.provision_within_s), (CapacityAdvice::Provision, Some(0.0)), "{busy:?}");
    assert!(busy.reason.contains("there are 2"), "{}", busy.reason);
}

/// What is needed of CPU within a day by one who has just been started, after days with `evening` cores more for two hours each.
fn need_after_restart(evening: f64) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let store = crate::store::Store::open(&folder.path().join("s.redb")).unwrap();
    let (now, minutes) = (unix_ms(), 3 * 24 * 60_u64);
    for left in (1..=minutes).rev().step_by(5) {
        let load = 0.2 + if (480..600).contains(&(left % 1_440)) { evening } else { 0.0 };
        let states = loaded(load);
        let measured = states.iter().flat_map(PoolState::measured);
        let samples: Vec<_> = measured.map(|(name, usage)| (format!("{}{name}", history::PREFIX), usage)).collect();
        store.add_samples(now - left * 60_000, &samples, false).unwrap();
    }
    let mut planner = planner_with(&serde_json::json!({}));
    planner.recall_week(&store, now).unwrap();
    live(&mut planner, 3, &[], |_| 0.2);
    of(&planner, "a", None).needs.last().unwrap().use_at_risk
}

#[test]
fn a_week_of_measurements_is_known_after_a_restart() {
    let (calm, busy) = (need_after_restart(0.0), need_after_restart(2.5));
    assert!((0.8..1.2).contains(&calm), "0.8 are used, and have been for days: {calm}");
    assert!(busy > 2.5, "3.3 each evening: {busy}");
}
