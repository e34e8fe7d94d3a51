//! Pools that learn from each other: the same models as an evaluation's, fitted off the hot path.

mod common;

use common::{Noise, cpu_sample};
use predictor::experience::{Experience, LESSONS};
use predictor::model::Budget;
use predictor::pools::{Done, Work};
use predictor::replay::Protocol;
use predictor::replay::pool::replay_pools;
use predictor::{BankConfig, Contention, PerResource, PoolConfig, Pools, Resource, Sample, Tick};

fn config(lessons: usize) -> PoolConfig {
    PoolConfig { step_s: 1.0, horizon_steps: 12, lessons, ..PoolConfig::default() }
}

/// Two machines; every fifty steps one of them bursts, half a window after a small bump that comes for nothing half of the time.
fn samples(t: usize, noise: &mut Noise, bursts: &[bool]) -> Vec<Sample> {
    let phase = t % 50;
    let bump = if phase == 20 { 0.4 } else { 0.0 };
    let burst = if (27..30).contains(&phase) && bursts[t / 50] { 1.5 } else { 0.0 };
    let load = 1.5 + bump + burst + 0.02 * noise.normal();
    vec![cpu_sample("vm0", Some(load)), cpu_sample("vm1", Some(1.0 + 0.02 * noise.normal()))]
}

fn tick(pools: &mut Pools, pool: &str, t: usize, samples: &[Sample]) -> Contention {
    let capacity = PerResource { cpu: Some(4.0), ..PerResource::default() };
    pools.tick(pool, &Tick { now_s: t as f64, capacity, samples, events: &[] }).expect("sound")
}

fn coins(seed: u64, count: usize) -> Vec<bool> {
    let mut noise = Noise::new(seed);
    (0..count).map(|_| noise.uniform() < 0.5).collect()
}

/// Probabilities of contention of pool `a` at each step.
fn run(pools: &mut Pools, steps: usize, mut at: impl FnMut(&mut Pools, usize)) -> Vec<f64> {
    let (mut noise, bursts) = (Noise::new(5), coins(9, steps / 50 + 1));
    let step = |t: usize| {
        let score = tick(pools, "a", t, &samples(t, &mut noise, &bursts)).score;
        at(pools, t);
        score
    };
    (0..steps).map(step).collect()
}

#[test]
fn trees_are_fitted_within_a_budget_and_bounded_memory() {
    let run = |budget: u64| {
        let (mut pools, mut fitted) = (Pools::new(config(500)).expect("sound"), 0);
        let scores = run(&mut pools, 2_000, |pools, t| {
            if t % 100 == 99 {
                fitted += pools.refit(&mut Budget::new(budget));
            }
        });
        let forecast = pools.machine_forecast("a", "vm0", Resource::Cpu, 12).expect("samples");
        assert!(forecast.quantiles.windows(2).all(|pair| pair[0] <= pair[1]), "{forecast:?}");
        (fitted, pools.dear_bytes(), scores)
    };
    let (none, bytes, scores) = run(0);
    assert_eq!(none, 0);
    let (few, ..) = run(6_000_000);
    let (all, fitted_bytes, fitted_scores) = run(u64::MAX);
    assert!(few > 0 && few < all, "{few} of {all}");
    assert!(scores != fitted_scores && fitted_scores.iter().all(|score| (0.0..=1.0).contains(score)));
    assert_eq!(fitted_scores, run(u64::MAX).2, "the same input gives the same scores");
    // 500 lessons of 42 halves of numbers for four windows and for machines at each, of CPU only, and 16 ensembles of 60 trees.
    let most = 8 * 500 * 42 * 2 + 16 * 60 * 300;
    assert!(bytes < fitted_bytes && fitted_bytes < most + 100_000, "{bytes} {fitted_bytes} {most}");
}

/// The squared error of what is said of the next window, from step `from` on, while the outcome is open.
fn brier(scores: &[f64], bursts: &[bool], from: usize) -> f64 {
    let open = |t: &usize| (20..27).contains(&(t % 50));
    let errors: Vec<f64> =
        (from..scores.len()).filter(open).map(|t| (scores[t] - f64::from(u8::from(bursts[t / 50]))).powi(2)).collect();
    errors.iter().sum::<f64>() / errors.len() as f64
}

#[test]
fn a_tick_during_a_fit_waits_for_nothing_and_uses_the_trees_fitted_last() {
    let steps = 6_000;
    let fit_at = |t: usize| t == 3_000 || t == 4_500;
    let mut pools = Pools::new(config(2_000)).expect("sound");
    let at_once = run(&mut pools, steps, |pools, t| {
        if fit_at(t) {
            pools.refit(&mut Budget::unlimited());
        }
    });
    // The same fits, begun at the same step and over only two hundred steps later.
    let mut pools = Pools::new(config(2_000)).expect("sound");
    let mut open: Vec<Work> = Vec::new();
    let beside = run(&mut pools, steps, |pools, t| {
        if fit_at(t) {
            open.extend(std::iter::from_fn(|| pools.begin(&mut Budget::unlimited())));
            assert!(!open.is_empty(), "something is due at {t}");
        }
        if t >= 200 && fit_at(t - 200) {
            let done: Vec<Done> = open.drain(..).map(Work::run).collect();
            assert!(done.into_iter().all(|done| pools.install(done)));
        }
    });
    let mut alone = Pools::new(config(0)).expect("sound");
    let alone = run(&mut alone, steps, |pools, _| assert!(pools.begin(&mut Budget::unlimited()).is_none()));
    assert_eq!(
        beside[..3_201],
        alone[..3_201],
        "no trees before the first are there: neither waited for nor half made"
    );
    assert_ne!(at_once[3_001..3_201], alone[3_001..3_201]);
    let bursts = coins(9, steps / 50 + 1);
    let [alone, beside] = [alone, beside].map(|scores| brier(&scores, &bursts, 4_800));
    assert!(beside < 0.95 * alone, "trees tell more: {beside} against {alone}");
}

#[test]
fn a_past_that_is_played_back_teaches_as_if_it_had_been_lived() {
    // Six machines that burst, each at times of its own.
    let mut noise = Noise::new(5);
    let coins: Vec<Vec<bool>> = (0..6).map(|machine| coins(machine, 60)).collect();
    let mut at = |t: usize| -> Vec<Sample> {
        let machine = |(number, coins): (usize, &Vec<bool>)| {
            let burst = samples(t + 7 * number, &mut noise, coins).swap_remove(0);
            Sample { machine: format!("vm{number}"), ..burst }
        };
        coins.iter().enumerate().map(machine).collect()
    };
    let past: Vec<Vec<Sample>> = (0..2_000).map(&mut at).collect();
    let of = |machine: usize| past.iter().map(|samples| samples[machine].values).collect::<Vec<_>>();
    let mut pools = Pools::new(config(2_000)).expect("sound");
    let machines = (0..6).map(|machine| (format!("vm{machine}"), of(machine)));
    pools.play_back("a", machines.collect()).expect("sound");
    tick(&mut pools, "a", 2_000, &at(2_000));
    assert!(pools.begin(&mut Budget::new(1_000)).is_none(), "a past is not gone through without a budget");
    let forecast = |pools: &Pools| pools.machine_forecast("a", "vm0", Resource::Cpu, 12).expect("samples");
    let before = forecast(&pools);
    let Some(Work::Study(study)) = pools.begin(&mut Budget::unlimited()) else {
        panic!("a past is to be studied first")
    };
    pools.install(Work::Study(study).run());
    assert!(pools.refit(&mut Budget::unlimited()) > 0);
    let cpu = &pools.experience().cpu;
    assert!(cpu.insight.windows().iter().all(|shared| shared.len() > 600));
    assert!(cpu.fleet.models().iter().any(|shared| (0..3).any(|level| shared.trusted(level))), "judged by that past");
    assert_ne!(forecast(&pools), before);
    assert_eq!(pools.experience().memory.fleet.models()[0].len(), 0, "nothing was measured");
    // A past is studied once.
    assert!(!matches!(pools.begin(&mut Budget::unlimited()), Some(Work::Study(_))));
}

#[test]
fn what_is_evaluated_is_what_runs() {
    // The same capacity, windows and series: to the last bit the same probabilities, with trees.
    let (step_s, steps) = (300.0, 2_600);
    let pool_config =
        PoolConfig { step_s, horizon_steps: 12, thresholds: PerResource::from_fn(|_| 1.0), ..PoolConfig::default() };
    let bank = BankConfig::for_horizon(step_s, 12);
    let protocol = Protocol {
        horizons: bank.horizons.clone(),
        test_from: 1_300,
        pool_origin_every: 1,
        refit_every: 600,
        ..Protocol::new(step_s, steps, &[5.0], None)
    };
    let series = |seed: u64| {
        let (mut noise, bursts) = (Noise::new(seed), coins(seed + 1, steps / 50 + 1));
        (0..steps).map(|t| samples(t, &mut noise, &bursts)[0].values.cpu).collect::<Vec<_>>()
    };
    let all = [series(1), series(2)];
    let said = replay_pools(&all, &protocol, &bank).expect("sound");
    assert!(said[3].iter().any(|said| said.probability != said.alone), "trees had a say");
    let capacity = |series: &[Option<f64>]| {
        let mut known: Vec<f64> = series[..protocol.test_from].iter().flatten().copied().collect();
        known.sort_by(f64::total_cmp);
        predictor::quantile::sorted_quantile(&known, protocol.capacity_quantile)
    };
    let mut pools = Pools::new(pool_config).expect("sound");
    let mut expected = said[3].iter();
    for t in 0..steps {
        for (name, series) in ["a", "b"].iter().zip(&all) {
            let capacity = PerResource { cpu: capacity(series), ..PerResource::default() };
            let samples = [cpu_sample("vm", series[t])];
            let tick = Tick { now_s: step_s * t as f64, capacity, samples: &samples, events: &[] };
            let contention = pools.tick(name, &tick).expect("sound");
            if t >= protocol.test_from && t + 12 < steps {
                let cpu = contention.resources.cpu.expect("measured");
                let said = cpu.maxima.last().expect("windows").exceedance(cpu.limit);
                assert_eq!(said, expected.next().expect("an origin").probability, "pool {name} at {t}");
            }
        }
        if (t + 1).is_multiple_of(protocol.refit_every) {
            pools.refit(&mut Budget::unlimited());
        }
    }
    // And made by the same constructor with the same settings.
    let json = |experience: &Experience| serde_json::to_string(experience).expect("can be stored");
    let fresh = Pools::new(PoolConfig { step_s, horizon_steps: 12, ..PoolConfig::default() }).expect("sound");
    assert_eq!(json(&fresh.experience().cpu), json(&Experience::new(&bank, LESSONS)));
}
