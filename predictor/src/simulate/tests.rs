//! Pools whose overload is known beforehand.

use super::cause::{Cause, Held, Kind};
use super::policy::{Nobody, Oracle, Order, Predictor, Reactive, Setting};
use super::*;
use crate::cost::MigrationShape;
use crate::evaluate::Series;
use crate::events::{Change, Event, Scope};
use crate::sample::PerResource;

/// Ten days of ten minutes; pool 0 has four machines of 2 with noise, pool 1 three of 1; capacity 10 each.
fn series() -> Vec<Series> {
    let mut state = 1_u64;
    let mut noise = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1_u64 << 24) as f64
    };
    (0..7)
        .map(|machine| (0..1_440).map(|_| Some(if machine < 4 { 2.0 } else { 1.0 } + 0.2 * noise())).collect())
        .collect()
}

/// A batch on machine 0, of two hours every day, that takes pool 0 over its capacity.
fn scenario(series: &[Series], from: usize) -> Scenario<'_> {
    let events = (5..9)
        .map(|day| {
            let start = 144 * day + 60;
            Injected {
                machine: 0,
                declared: Event {
                    id: format!("e{day}"),
                    name: "batch".into(),
                    scope: Scope::Machine("vm0".into()),
                    start_s: start as f64 * 600.0,
                    end_s: (start + 12) as f64 * 600.0,
                    change: PerResource { cpu: Some(Change::Add(4.0)), ..PerResource::default() },
                    confidence: 0.9,
                },
                happens: start..start + 12,
                amount: 4.0,
            }
        })
        .collect();
    Scenario {
        period_s: 600.0,
        names: (0..7).map(|machine| format!("vm{machine}")).collect(),
        series: series.iter().collect(),
        pools: vec![0, 0, 0, 0, 1, 1, 1],
        capacity: vec![10.0, 10.0],
        warm_from: from - 300,
        from,
        until: 1_400,
        events,
        shape: MigrationShape {
            memory_bytes: 4e9,
            bandwidth_bytes_per_second: 5e8,
            downtime_limit_ms: 50.0,
            ..MigrationShape::default()
        },
    }
}

#[test]
fn nobody_suffers_all_and_one_who_knows_suffers_nothing() {
    let series = series();
    let scenario = scenario(&series, 700);
    let none = run(&scenario, &mut Nobody).expect("sound");
    // Four batches of twelve steps of ten minutes.
    assert_eq!((none.violation_minutes, none.moves), (480.0, 0.0));
    assert_eq!(none.minutes, 2.0 * 700.0 * 10.0);
    // All of it is due to events, and each of the four begins once.
    let event = Cause { kind: Kind::Event, held: Held::Untold, minutes: 480.0, first_minutes: 40.0 };
    assert_eq!(none.causes, [event]);
    let oracle = run(&scenario, &mut Oracle::new(2, 6, 1)).expect("sound");
    assert!(oracle.violation_minutes < 25.0 && oracle.moves <= 8.0, "{oracle:?}");
}

#[test]
fn minutes_are_put_down_to_what_they_are_made_of() {
    let series = series();
    let mut scenario = scenario(&series, 700);
    // Capacities that both are above: one of them cannot be helped, and the other suffers from its machines.
    scenario.capacity = vec![5.0, 2.0];
    scenario.events.clear();
    let none = run(&scenario, &mut Nobody).expect("sound");
    let minutes = |kind: Kind| none.causes.iter().filter(|cause| cause.kind == kind).map(|cause| cause.minutes).sum();
    let (unavoidable, rise): (f64, f64) = (minutes(Kind::Unavoidable), minutes(Kind::Rise));
    assert_eq!((unavoidable, rise), (7_000.0, 7_000.0));
    assert_eq!(none.causes.iter().map(|cause| cause.first_minutes).sum::<f64>(), 0.0, "it began before");
    // One machine more is too much: for two hours that is due to its arrival, then it belongs there.
    scenario.capacity = vec![8.9, 10.0];
    let sent = run(&scenario, &mut Sends { order: Order { machine: 4, to: 0 }, at: scenario.from }).expect("sound");
    let of = |kind: Kind, minutes: f64, first_minutes: f64| Cause { kind, held: Held::Untold, minutes, first_minutes };
    assert_eq!(sent.causes, [of(Kind::Arrival, 120.0, 10.0), of(Kind::Rise, 6_870.0, 0.0)]);
    assert_eq!((sent.violation_minutes, sent.moves), (6_990.0, 1.0));
}

/// Moves one machine, once.
struct Sends {
    order: Order,
    at: usize,
}

impl Policy for Sends {
    fn step(&mut self, world: &World<'_>, _: bool) -> Result<Vec<Order>, BankError> {
        Ok((world.t == self.at).then_some(self.order).into_iter().collect())
    }
}

#[test]
fn a_third_pool_takes_what_the_second_has_no_room_for() {
    let series = series();
    let mut scenario = scenario(&series, 700);
    // The second pool is nearly full; the third has nothing but room.
    scenario.capacity = vec![10.0, 4.0, 10.0];
    for leaves in [Oracle::new(3, 6, 1), Oracle::new(3, 6, 3)] {
        let mut oracle = leaves;
        let outcome = run(&scenario, &mut oracle).expect("sound");
        assert!(outcome.violation_minutes < 100.0 && outcome.moves >= 1.0, "{outcome:?}");
    }
    let warm = Predictor::warm(&scenario, 6).expect("sound");
    let mut declared = warm.with(Setting { act_above: 0.2, benefit_minutes: 4.0 }, true);
    let outcome = play(World::at(&scenario, scenario.from), &mut declared).expect("sound");
    assert!(outcome.violation_minutes < 240.0 && outcome.moves >= 1.0, "{outcome:?}");
}

#[test]
fn a_threshold_acts_when_it_is_too_late_and_a_declared_event_is_met_in_time() {
    let series = series();
    let scenario = scenario(&series, 700);
    let reactive = run(&scenario, &mut Reactive::new(2, 0.95)).expect("sound");
    assert!(reactive.violation_minutes > 0.0 && reactive.violation_minutes < 480.0, "{reactive:?}");
    let warm = Predictor::warm(&scenario, 6).expect("sound");
    let setting = Setting { act_above: 0.2, benefit_minutes: 4.0 };
    let played =
        |declared: bool| play(World::at(&scenario, scenario.from), &mut warm.with(setting, declared)).expect("sound");
    let declared = played(true);
    assert!(declared.violation_minutes < 0.5 * reactive.violation_minutes + 1.0, "{declared:?} against {reactive:?}");
    assert!(declared.moves <= 2.0 * reactive.moves + 2.0, "{declared:?} against {reactive:?}");
    assert_eq!(declared, played(true), "what is shared is not changed");
}
