//! Trees beside ticks, and after a restart.

use super::*;
use crate::planner::refit::Allowance;
use predictor::model::Budget;
use std::time::Duration;

/// Every forty steps a small bump, and eight steps later a burst, or nothing, with even odds.
fn bursts(step: usize) -> f64 {
    let (round, phase) = (step / 40, step % 40);
    let comes = (round.wrapping_mul(2_654_435_761) >> 7) % 2 == 0;
    let jitter = 0.01 * ((step * 7919) % 11) as f64 / 11.0;
    jitter
        + if phase == 20 {
            0.45
        } else if comes && (28..31).contains(&phase) {
            1.5
        } else {
            0.3
        }
}

fn planner_with(lessons: usize) -> Planner {
    planner(|json| json["planner"] = serde_json::json!({"horizon_s": 12.0, "enabled": false, "lessons": lessons}))
}

/// The loss of what was said of the next twelve seconds (Brier, while the outcome is open), over the steps `of`.
fn loss(planner: &mut Planner, of: std::ops::Range<usize>) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for step in of {
        planner.tick(loaded(bursts(step)), &[]).unwrap();
        if (21..27).contains(&(step % 40)) {
            let came = f64::from(u8::from(bursts(step / 40 * 40 + 29) > 1.0));
            sum += (planner.views()[0].score.unwrap() - came).powi(2);
            count += 1.0;
        }
    }
    sum / count
}

/// All that the planner says of its pools and machines, without when it said so.
fn said(planner: &Planner) -> String {
    let views: Vec<_> = planner.views().into_iter().map(|view| (view.score, view.forecasts)).collect();
    format!("{views:?} {:?}", planner.machine_forecasts())
}

#[test]
fn ticks_go_on_beside_a_fit_with_what_was_fitted_last_and_forecasts_improve_after_it() {
    let (mut alone, mut beside) = (planner_with(0), planner_with(4_000));
    let fitted_at = 2_400;
    for planner in [&mut alone, &mut beside] {
        loss(planner, 0..fitted_at);
    }
    assert!(alone.begin_refit(&mut Budget::unlimited()).is_none(), "without lessons there is nothing to fit");
    let mut open = Vec::new();
    while let Some(work) = beside.begin_refit(&mut Budget::unlimited()) {
        open.push(work);
    }
    assert!(open.len() > 8, "{} ensembles are due", open.len());
    // All fits are under way. What ticks do and say meanwhile is what they do without any: nobody waits, nothing is half made.
    for step in fitted_at..fitted_at + 40 {
        for planner in [&mut alone, &mut beside] {
            planner.tick(loaded(bursts(step)), &[]).unwrap();
        }
        assert_eq!(said(&beside), said(&alone), "step {step}");
    }
    for work in open {
        beside.end_refit(work.run());
    }
    let [before, after] = [&mut alone, &mut beside].map(|planner| loss(planner, fitted_at + 40..fitted_at + 840));
    assert_ne!(said(&beside), said(&alone));
    assert!(after < 0.97 * before, "{after} against {before}");
}

#[test]
fn trees_are_there_again_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = crate::store::Store::open(&folder.path().join("s.redb")).unwrap();
    let lessons = serde_json::json!({"horizon_s": 12.0, "enabled": false, "lessons": 4_000});
    let config = config(|json| json["planner"] = lessons);
    let (now, steps) = (unix_ms(), 2_000);
    for step in 0..steps {
        let states = loaded(bursts(step));
        let measured = states.iter().flat_map(PoolState::measured);
        let samples: Vec<_> = measured.map(|(name, usage)| (format!("{}{name}", history::PREFIX), usage)).collect();
        store.add_samples(now - (steps - step) as u64 * 1000, &samples, step + 1 == steps).unwrap();
    }
    let restarted = || {
        let mut planner = Planner::new(&config).unwrap();
        planner.recall(History::load(&store, &config, now).unwrap());
        planner.tick(loaded(bursts(steps)), &[]).unwrap();
        planner
    };
    let (mut without, mut with) = (restarted(), restarted());
    let mut allowance = Allowance::default();
    assert!(allowance.spend(&mut with).is_none(), "nothing was earned yet");
    allowance.earn(Duration::from_secs(600));
    let mut fits = 0;
    while let Some(work) = allowance.spend(&mut with) {
        with.end_refit(work.run());
        fits += 1;
    }
    assert!(fits > 8, "{fits}");
    let [before, after] = [&mut without, &mut with].map(|planner| loss(planner, steps + 1..steps + 401));
    assert!(after < before, "what was stored teaches: {after} against {before}");
}
