//! The bank against series whose truth is known, and against input that no meter should give.

mod common;

use common::Noise;
use predictor::{Bank, BankConfig, BankError, LEVELS};
use proptest::prelude::*;

fn bank() -> Bank {
    Bank::new(BankConfig::default()).expect("the default configuration is sound")
}

/// Mean absolute error of the bank and of naive `steps` ahead, and the share of outcomes not above each quantile.
fn evaluate(series: &[f64], steps: usize, warm: usize) -> (f64, f64, [f64; LEVELS.len()]) {
    let mut bank = bank();
    let (mut error, mut naive, mut count) = (0.0, 0.0, 0.0);
    let mut covered = [0.0; LEVELS.len()];
    for (t, value) in series.iter().enumerate() {
        bank.update(Some(*value));
        let Some(outcome) = series.get(t + steps).filter(|_| t >= warm) else { continue };
        let forecast = bank.forecast(steps).expect("it has seen samples");
        error += (outcome - forecast.point).abs();
        naive += (outcome - value).abs();
        count += 1.0;
        for (covered, quantile) in covered.iter_mut().zip(forecast.quantiles) {
            *covered += f64::from(u8::from(*outcome <= quantile));
        }
    }
    (error / count, naive / count, covered.map(|covered| covered / count))
}

#[test]
fn quantiles_are_calibrated_on_series_of_every_kind() {
    let mut noise = Noise::new(1);
    let mut level = 50.0;
    let random_walk: Vec<f64> = (0..12_000)
        .map(|_| {
            level = f64::max(level + noise.normal(), 0.0);
            level
        })
        .collect();
    let mut state = 0.0;
    let regressive: Vec<f64> = (0..12_000)
        .map(|_| {
            state = 0.8 * state + noise.normal();
            100.0 + state
        })
        .collect();
    let bursts: Vec<f64> = (0..12_000).map(|_| 5.0 * noise.exponential()).collect();
    let daily: Vec<f64> = (0..12_000)
        .map(|t| 50.0 + 30.0 * (f64::from(t) * std::f64::consts::TAU / 288.0).sin() + noise.normal())
        .collect();
    for (name, series) in
        [("random walk", random_walk), ("autoregressive", regressive), ("bursts", bursts), ("daily", daily)]
    {
        for steps in [1, 3, 12] {
            let (error, naive, covered) = evaluate(&series, steps, 2_000);
            assert!(error < 1.03 * naive, "{name} at {steps}: {error} against naive's {naive}");
            for (covered, level) in covered.iter().zip(LEVELS) {
                assert!((covered - level).abs() < 0.02, "{name} at {steps}: level {level} covers {covered}");
            }
        }
    }
}

#[test]
fn beats_naive_where_there_is_something_to_learn() {
    let mut noise = Noise::new(2);
    let jumpy: Vec<f64> = (0..4_000).map(|_| 10.0 + noise.normal()).collect();
    let (error, naive, _) = evaluate(&jumpy, 3, 1_000);
    assert!(error < 0.75 * naive, "noise about a level: {error} against {naive}");
    let ramps: Vec<f64> = (0..4_000).map(|t| f64::from(t % 200).min(200.0 - f64::from(t % 200))).collect();
    let (error, naive, _) = evaluate(&ramps, 12, 1_000);
    assert!(error < 0.5 * naive, "ramps: {error} against {naive}");
}

#[test]
fn a_ramp_is_seen_after_a_short_history() {
    let mut bank = Bank::new(BankConfig::for_horizon(1.0, 30)).expect("sound");
    let mut noise = Noise::new(3);
    for t in 0..50 {
        bank.update(Some(1.0 + 0.02 * noise.normal() + 0.05 * f64::from((t - 30).max(0))));
    }
    // Now 1.95, rising by 0.05 a step: 3.45 in 30 steps if it goes on.
    let forecast = bank.forecast(30).expect("it has seen samples");
    assert!(forecast.point > 2.2, "{forecast:?}");
    assert!(forecast.quantile(0.95) > 3.0, "{forecast:?}");
}

#[test]
fn two_samples_one_sample_none() {
    let mut bank = bank();
    assert!(bank.forecast(1).is_none());
    bank.update(None);
    assert!(bank.forecast(1).is_none());
    bank.update(Some(4.0));
    let one = bank.forecast(12).expect("one sample is something");
    assert_eq!(one.point, 4.0);
    assert!(one.quantile(0.95) > 4.0, "one sample is no certainty: {one:?}");
    bank.update(Some(5.0));
    let two = bank.forecast(12).expect("two samples");
    assert!((3.0..=7.0).contains(&two.point) && two.quantile(0.95) > two.point, "{two:?}");
}

#[test]
fn a_constant_series_is_forecast_as_constant() {
    for value in [0.0, 7.25, 1e12] {
        let mut bank = bank();
        for _ in 0..2_000 {
            bank.update(Some(value));
        }
        let forecast = bank.forecast(12).expect("samples");
        let tolerance = 1e-3 * value;
        assert!((forecast.point - value).abs() <= tolerance, "{forecast:?}");
        assert!(forecast.quantiles.iter().all(|q| (q - value).abs() <= tolerance), "{forecast:?}");
    }
}

#[test]
fn gaps_neither_score_nor_stop_time() {
    let mut noise = Noise::new(4);
    let mut bank = bank();
    for t in 0..3_000 {
        let value = 20.0 + noise.normal();
        bank.update((t % 5 != 0 && !(1_000..1_200).contains(&t)).then_some(value));
    }
    let forecast = bank.forecast(3).expect("samples");
    assert!((forecast.point - 20.0).abs() < 1.0 && forecast.quantile(0.95) < 24.0, "{forecast:?}");
}

#[test]
fn no_forecast_blows_up_after_a_burst() {
    let mut noise = Noise::new(5);
    let mut bank = bank();
    for t in 0..5_000 {
        let burst = if t % 400 < 3 { 90.0 } else { 0.0 };
        bank.update(Some(1.0 + 0.1 * noise.uniform() + burst));
        let forecast = bank.forecast(12).expect("samples");
        assert!((0.0..=190.0).contains(&forecast.point), "at {t}: {forecast:?}");
        assert!(forecast.quantile(0.95) < 500.0, "at {t}: {forecast:?}");
    }
}

#[test]
fn states_survive_storage_and_go_on_alike() {
    let mut noise = Noise::new(6);
    let mut bank = bank();
    for t in 0..100 {
        bank.update((t % 7 != 0).then(|| 3.0 + noise.normal()));
    }
    let stored = serde_json::to_string(&bank).expect("state can be stored");
    let mut restored: Bank = serde_json::from_str(&stored).expect("and read back");
    for t in 0..100 {
        let value = (t % 11 != 0).then(|| 3.0 + noise.normal());
        bank.update(value);
        restored.update(value);
        assert_eq!(bank.forecast(3), restored.forecast(3));
    }
}

#[test]
fn configurations_that_cannot_work_are_refused_by_name() {
    for horizons in [vec![], vec![0], vec![3, 1], vec![1, 1], vec![1_000_000], (1..=20).collect()] {
        let refused = Bank::new(BankConfig { horizons: horizons.clone(), ..BankConfig::default() });
        assert!(matches!(refused, Err(BankError::Horizons(_))), "{horizons:?}");
    }
    let refused = Bank::new(BankConfig { level_rate: f64::NAN, ..BankConfig::default() });
    assert!(refused.is_err_and(|error| error.to_string().contains("level_rate")));
    let refused = Bank::new(BankConfig { ridge_penalty: 0.0, ..BankConfig::default() });
    assert!(refused.is_err_and(|error| error.to_string().contains("ridge_penalty")));
    for steps in [0, 1, 2, 7, 30, 60, 288, usize::MAX] {
        Bank::new(BankConfig::for_horizon(300.0, steps)).expect("every horizon can be asked for");
    }
}

fn any_sample() -> impl Strategy<Value = Option<f64>> {
    prop_oneof![
        6 => (0.0_f64..100.0).prop_map(Some),
        1 => (0.0_f64..1e15).prop_map(Some),
        1 => prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(f64::NEG_INFINITY), Just(-1.0), Just(f64::MAX)].prop_map(Some),
        1 => Just(None),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_comes_forecasts_are_finite_ordered_and_not_negative(
        samples in proptest::collection::vec(any_sample(), 1..300), steps in 0_usize..40,
    ) {
        let mut bank = bank();
        for sample in samples {
            bank.update(sample);
            if let Some(forecast) = bank.forecast(steps) {
                prop_assert!(forecast.point.is_finite() && forecast.point >= 0.0, "{forecast:?}");
                prop_assert!(forecast.quantiles.iter().all(|q| q.is_finite() && *q >= 0.0), "{forecast:?}");
                prop_assert!(forecast.quantiles.windows(2).all(|pair| pair[0] <= pair[1]), "{forecast:?}");
            }
        }
    }

    #[test]
    fn the_unit_does_not_matter(values in proptest::collection::vec(0.1_f64..100.0, 20..200)) {
        // The same series in cores and in millions: forecasts differ by that factor only.
        let (mut small, mut large) = (bank(), bank());
        for value in values {
            small.update(Some(value));
            large.update(Some(value * 1_048_576.0));
        }
        let (small, large) = (small.forecast(3).expect("samples"), large.forecast(3).expect("samples"));
        prop_assert!((small.point * 1_048_576.0 / large.point - 1.0).abs() < 1e-3);
    }
}

#[test]
fn one_enormous_sample_leaves_finite_forecasts() {
    let mut bank = bank();
    bank.update(Some(451_168_127_188_917.5));
    for step in 0..200 {
        bank.update(Some(f64::from(10 + step % 7)));
        for steps in [1, 15, 39] {
            if let Some(forecast) = bank.forecast(steps) {
                assert!(forecast.point.is_finite(), "after {step} steps: {forecast:?}");
            }
        }
    }
}

#[test]
fn banks_that_began_together_solve_at_different_steps() {
    let config = BankConfig { horizons: vec![1], ..BankConfig::default() };
    let staggered = |steps| Bank::new(config.clone()).expect("sound").staggered(steps);
    let (mut early, mut late) = (staggered(40), staggered(0));
    let mut noise = Noise::new(23);
    let (mut apart, mut near) = (0, 0);
    let mut value = 50.0;
    for _ in 0..4_000 {
        value = 50.0 + 0.6 * (value - 50.0) + noise.normal();
        early.update(Some(value));
        late.update(Some(value));
        let [early, late] = [&early, &late].map(|bank| bank.forecast(1).expect("samples").point);
        apart += u32::from(early != late);
        near += u32::from((early - late).abs() < 0.5);
    }
    assert!(apart > 2_000, "they hold different solutions most of the time: {apart}");
    assert!(near > 3_800, "of the same series: {near}");
}
