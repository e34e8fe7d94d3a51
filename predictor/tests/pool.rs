//! A pool under a ramp, declared events, machines that come and go, and bad input.

mod common;

use common::{Noise, cpu_sample};
use predictor::{Change, Contention, Event, PerResource, PoolConfig, PoolForecaster, Resource, Sample, Scope, Tick};

const CAPACITY: PerResource<Option<f64>> = PerResource { cpu: Some(4.0), memory: None, io: None, network: None };

/// One-second steps, thirty ahead.
fn forecaster() -> PoolForecaster {
    PoolForecaster::new(PoolConfig { step_s: 1.0, horizon_steps: 30, ..PoolConfig::default() }).expect("sound")
}

fn tick(pool: &mut PoolForecaster, now_s: f64, samples: &[Sample], events: &[Event]) -> Contention {
    pool.tick(&Tick { now_s, capacity: CAPACITY, samples, events }).expect("a sound configuration never fails")
}

/// Five machines that share `total` cores, with some noise.
fn machines(total: f64, noise: &mut Noise) -> Vec<Sample> {
    (0..5).map(|i| cpu_sample(format!("vm{i}"), Some((total / 5.0 + 0.02 * noise.normal()).max(0.0)))).collect()
}

fn batch(start_s: f64, end_s: f64, cores: f64, confidence: f64) -> Event {
    Event {
        id: "e1".into(),
        name: "batch".into(),
        scope: Scope::Pool,
        start_s,
        end_s,
        change: PerResource { cpu: Some(Change::Add(cores)), ..PerResource::default() },
        confidence,
    }
}

#[test]
fn a_ramp_raises_the_score_well_before_the_capacity_is_crossed_and_calm_does_not() {
    for seed in 1..=5 {
        let mut noise = Noise::new(seed);
        let mut pool = forecaster();
        let mut raised_at = None;
        let mut crossed_at = None;
        for t in 0..120 {
            // Two cores for 45 s, then 0.04 cores more every second: 3.8 (the limit) is crossed 45 s later.
            let total = 2.0 + 0.04 * f64::from((t - 45).max(0));
            let state = tick(&mut pool, f64::from(t), &machines(total, &mut noise), &[]);
            if t < 45 {
                assert!(t < 10 || state.score < 0.3, "seed {seed}: calm, but a score of {} at {t}", state.score);
            } else if state.score >= 0.5 && raised_at.is_none() {
                raised_at = Some(t);
            }
            if total > 3.8 && crossed_at.is_none() {
                crossed_at = Some(t);
            }
        }
        let (raised, crossed) = (raised_at.expect("the score rose"), crossed_at.expect("it crossed"));
        assert!(crossed - raised >= 12, "seed {seed}: raised at {raised}, crossed at {crossed}");
        assert!(raised >= 50, "seed {seed}: raised at {raised}, hardly after the ramp began");
    }
}

#[test]
fn probabilities_grow_with_the_window_and_fall_with_the_capacity() {
    let mut noise = Noise::new(9);
    let mut pool = forecaster();
    for t in 0..200 {
        let state = tick(&mut pool, f64::from(t), &machines(3.2, &mut noise), &[]);
        let cpu = state.resources.cpu.expect("known");
        assert!(cpu.onset.windows(2).all(|pair| pair[0].probability <= pair[1].probability));
        assert!(state.score >= cpu.probability - 1e-12 && (0.0..=1.0).contains(&state.score));
    }
    let mut before = 1.0;
    for capacity in [2.0, 3.0, 3.3, 3.5, 4.0, 8.0] {
        let state = pool.contention(&PerResource { cpu: Some(capacity), ..PerResource::default() });
        assert!(state.score <= before + 1e-12, "capacity {capacity}: {} after {before}", state.score);
        before = state.score;
    }
    assert!(before < 0.01, "twice of what was ever used is enough: {before}");
}

#[test]
fn the_probability_is_calibrated_when_load_is_stationary() {
    let mut noise = Noise::new(10);
    let mut pool =
        PoolForecaster::new(PoolConfig { step_s: 300.0, horizon_steps: 12, ..PoolConfig::default() }).expect("sound");
    let mut state = 0.0;
    let series: Vec<f64> = (0..6_000)
        .map(|_| {
            state = 0.9 * state + 0.15 * noise.normal();
            f64::max(3.0 + state, 0.0)
        })
        .collect();
    let (mut said, mut came, mut brier, mut count) = (0.0, 0.0, 0.0, 0.0);
    for (t, value) in series.iter().enumerate() {
        let state = tick(&mut pool, t as f64 * 300.0, &[cpu_sample("vm", Some(*value))], &[]);
        if t >= 1_000 && t + 12 < series.len() {
            let exceeded = series[t + 1..=t + 12].iter().any(|value| *value > 3.8);
            let outcome = f64::from(u8::from(exceeded));
            said += state.score;
            came += outcome;
            brier += (state.score - outcome).powi(2);
            count += 1.0;
        }
    }
    let (said, came, brier) = (said / count, came / count, brier / count);
    assert!((said - came).abs() < 0.015, "said {said}, came {came}");
    assert!(brier < 0.9 * came * (1.0 - came), "better than the base rate {came}: {brier}");
}

#[test]
fn a_declared_event_raises_the_score_before_it_starts() {
    let mut noise = Noise::new(11);
    let (mut told, mut untold) = (forecaster(), forecaster());
    let event = [batch(80.0, 120.0, 2.5, 0.9)];
    for t in 0..79 {
        let samples = machines(2.0, &mut noise);
        let with = tick(&mut told, f64::from(t), &samples, &event);
        let without = tick(&mut untold, f64::from(t), &samples, &[]);
        if t >= 15 {
            assert!(without.score < 0.3, "at {t}: {}", without.score);
            match t {
                ..50 => assert!((with.score - without.score).abs() < 1e-9, "not within the horizon at {t}"),
                50 => {
                    assert!(with.score > 0.85 && with.score < 0.98, "declared with 0.9: {}", with.score);
                    assert!(with.reasons.iter().any(|why| why.contains("\"batch\"")), "{:?}", with.reasons);
                }
                _ => assert!(with.score > 0.8, "at {t}: {}", with.score),
            }
        }
    }
}

#[test]
fn an_event_that_does_not_happen_changes_nothing_and_one_that_does_is_not_taken_for_normal() {
    for happens in [false, true] {
        let (mut told, mut untold) = (forecaster(), forecaster());
        let mut noise = Noise::new(12);
        let event = [batch(60.0, 100.0, 1.5, 0.8)];
        for t in 0..140 {
            let in_effect = happens && (60..100).contains(&t);
            let base = machines(2.0, &mut noise);
            let mut samples = base.clone();
            if in_effect {
                samples[0].values.cpu = samples[0].values.cpu.map(|cpu| cpu + 1.5);
            }
            let state = tick(&mut told, f64::from(t), &samples, &event);
            // The other one lives where there is no event.
            let calm = tick(&mut untold, f64::from(t), &base, &[]);
            if (65..95).contains(&t) {
                let now = told.forecast(Resource::Cpu, 1).expect("samples").point;
                let expected = if happens { 3.5 } else { 2.0 };
                assert!((now - expected).abs() < 0.3, "at {t}, happens {happens}: {now}");
            }
            if t >= 110 {
                let point = |pool: &PoolForecaster| pool.forecast(Resource::Cpu, 30).expect("samples").quantile(0.95);
                assert!((point(&told) - point(&untold)).abs() < 0.25, "at {t}: {} {}", point(&told), point(&untold));
                assert!((state.score - calm.score).abs() < 0.15, "at {t}: {} {}", state.score, calm.score);
            }
        }
        assert_eq!(told.event_record("batch").happened, f64::from(u8::from(happens)));
    }
}

#[test]
fn a_machine_that_leaves_or_comes_is_no_change_of_load() {
    let mut noise = Noise::new(13);
    let (mut source, mut target) = (forecaster(), forecaster());
    for t in 0..100 {
        let all = machines(3.0, &mut noise);
        tick(&mut source, f64::from(t), &all, &[]);
        tick(&mut target, f64::from(t), &[cpu_sample("other", Some(1.0 + 0.02 * noise.normal()))], &[]);
    }
    let history = source.history("vm2").expect("a member").clone();
    target.adopt("vm2", history).expect("sound");
    let rest: Vec<Sample> = machines(3.0, &mut noise).into_iter().filter(|sample| sample.machine != "vm2").collect();
    let state = tick(&mut source, 100.0, &rest, &[]);
    let forecast = source.forecast(Resource::Cpu, 30).expect("samples");
    assert!((forecast.point - 2.4).abs() < 0.15, "{forecast:?}");
    assert!(forecast.quantile(0.95) < 2.9, "no trend from the leaving: {forecast:?}");
    assert!(state.score < 0.05);
    assert_eq!(source.machines().count(), 4);
    let both = [cpu_sample("other", Some(1.0)), cpu_sample("vm2", Some(0.6))];
    tick(&mut target, 100.0, &both, &[]);
    let forecast = target.forecast(Resource::Cpu, 30).expect("samples");
    assert!((forecast.point - 1.6).abs() < 0.15 && forecast.quantile(0.95) < 2.0, "{forecast:?}");
    assert_eq!(target.machines().count(), 2);
}

#[test]
fn one_machine_without_samples_does_not_hide_or_halve_the_pool() {
    let mut noise = Noise::new(14);
    let mut pool = forecaster();
    for t in 0..80 {
        let mut samples = machines(3.0, &mut noise);
        if t >= 60 {
            samples[1].values.cpu = None;
        }
        let state = tick(&mut pool, f64::from(t), &samples, &[]);
        if t > 0 {
            let now = state.resources.cpu.expect("known").now;
            assert!((now - 3.0).abs() < 0.3, "at {t}: {now}");
        }
    }
}

#[test]
fn bad_samples_and_capacities_give_a_score_all_the_same() {
    let mut pool = forecaster();
    let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -3.0, 1e300, 0.0];
    for t in 0..200 {
        let value = bad[t % bad.len()];
        let samples = [Sample { machine: "vm".into(), values: PerResource::from_fn(|_| Some(value)) }];
        let capacity = PerResource::from_fn(|_| Some(bad[(t / 3) % bad.len()]));
        let event = Event { confidence: value, start_s: value, ..batch(0.0, 1e3, value, 0.5) };
        let state =
            pool.tick(&Tick { now_s: t as f64, capacity, samples: &samples, events: &[event] }).expect("never fails");
        assert!((0.0..=1.0).contains(&state.score), "{state:?}");
    }
    let empty = tick(&mut forecaster(), 0.0, &[], &[]);
    assert_eq!(empty.score, 0.0);
    let config = PoolConfig { step_s: 0.0, ..PoolConfig::default() };
    assert!(PoolForecaster::new(config).is_err_and(|error| error.to_string().contains("step_s")));
}

#[test]
fn states_survive_storage_and_runs_are_alike() {
    let run = |store_at: Option<i32>| {
        let mut noise = Noise::new(15);
        let mut pool = forecaster();
        let event = [batch(40.0, 60.0, 1.0, 0.5)];
        (0..100)
            .map(|t| {
                if store_at == Some(t) {
                    let stored = serde_json::to_string(&pool).expect("state can be stored");
                    pool = serde_json::from_str(&stored).expect("and read back");
                }
                tick(&mut pool, f64::from(t), &machines(3.0, &mut noise), &event).score
            })
            .collect::<Vec<f64>>()
    };
    let whole = run(None);
    assert_eq!(whole, run(None), "the same input gives the same scores");
    assert_eq!(whole, run(Some(50)), "also after a restart");
}

/// A quiet pool whose use makes one jump and is quiet again: the jump counts once, and not in usual errors of the quiet time
/// before it times those of the time after it.
#[test]
fn a_jump_after_a_flat_time_does_not_frighten_for_long() {
    let mut noise = Noise::new(3);
    let mut pool = forecaster();
    let mut highest = 0.0_f64;
    for t in 0..140 {
        let total = if t < 60 { 1.2 } else { 1.8 };
        let samples: Vec<Sample> =
            (0..5).map(|i| cpu_sample(format!("vm{i}"), Some(total / 5.0 + 0.002 * noise.normal()))).collect();
        let state = tick(&mut pool, f64::from(t), &samples, &[]);
        if t > 65 {
            highest = highest.max(state.score);
        }
        if t == 139 {
            let cpu = state.resources[Resource::Cpu].as_ref().expect("measured");
            let upper = cpu.maximum(30).expect("a forecast").quantile(0.95);
            // Another jump like it is thinkable, four of them are not.
            assert!(upper < 1.8 + 2.0 * 0.6, "at most {upper:.2} with 95 %");
        }
    }
    assert!(highest < 0.25, "1.8 of 3.8 cores are used, and the score was {highest:.2}");
}

#[test]
fn contention_that_an_event_brings_begins_with_it() {
    let mut noise = Noise::new(7);
    let mut pool = forecaster();
    for t in 0..60 {
        tick(&mut pool, f64::from(t), &machines(2.0, &mut noise), &[]);
    }
    // Horizons of this forecaster are 15 and 30 steps: the start lies between them.
    let state = tick(&mut pool, 60.0, &machines(2.0, &mut noise), &[batch(86.0, 200.0, 3.0, 0.95)]);
    let cpu = state.resources[Resource::Cpu].as_ref().expect("measured");
    let expected = cpu.reaches(0.3).expect("contention is expected");
    assert!((25.0..=28.0).contains(&expected), "in 26 s, not in {expected:.1} s");
    assert_eq!(cpu.onset.len(), cpu.maxima.len());
}
