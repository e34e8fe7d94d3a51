//! Violation minutes to expect of a pool: from its course and from its forecast, each as far as it knows.
//!
//! The course plays the past on with other machines, and knows which of them peak together; but what was never seen does not occur in it.
//! The forecast goes on from where the pool stands now, and knows of a machine only what it is expected to use. Which of them counts is a
//! matter of whether the pool has been there before ([`novelty`]):
//!
//! ```text
//! minutes = (1 - novelty) x minutes by the course + novelty x minutes by the forecast
//! ```
//!
//! A load that climbs higher than ever is new at every step, a peak of every day is not.

use crate::contention::{Contention, ResourceContention};
use crate::course::{Course, SEVERITY};
use crate::sample::{PerResource, Resource};

/// A pool with machines taken away and brought in.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changed {
    /// Its course with them; empty = not known.
    pub course: Course,
    /// What was taken away (negative: brought there).
    pub gone: PerResource<f64>,
}

impl Changed {
    /// With `demand` taken away, that of a machine with that name and course.
    pub fn without(&self, machine: &str, course: &Course, demand: &PerResource<f64>) -> Self {
        Self {
            course: self.course.without(machine, course),
            gone: PerResource::from_fn(|resource| self.gone[resource] + demand[resource]),
        }
    }

    /// With such a machine brought in.
    pub fn with(&self, course: &Course, demand: &PerResource<f64>) -> Self {
        Self {
            course: self.course.with(course),
            gone: PerResource::from_fn(|resource| self.gone[resource] - demand[resource]),
        }
    }
}

/// When minutes are counted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counted {
    /// From so many seconds from now on: before, nothing has changed.
    pub from_s: f64,
    /// For so long after the horizon what is forecast for its end goes on, where only a forecast is known.
    pub lasting_s: f64,
}

/// Probability that what comes is none of what the course has seen: of `k` moments before the last horizon that were as high as this one
/// and this one itself, all being alike, it is the first of another kind with 1 / (k + 1) (Laplace's rule of succession). 1 where nothing
/// was ever as high.
pub(crate) fn novelty(contention: &Contention, course: &Course) -> PerResource<f64> {
    PerResource::from_fn(|resource| {
        let recent = &course.recent[resource];
        let steps = (contention.horizon_s / course.step_s).round().max(1.0) as usize;
        let Some(now) = recent.last() else { return 1.0 };
        let before = &recent[..recent.len().saturating_sub(steps)];
        1.0 / (1.0 + before.iter().filter(|value| *value >= now).count() as f64)
    })
}

/// The more of both: a load that was never seen comes along with its machine.
pub(crate) fn either(a: &PerResource<f64>, b: &PerResource<f64>) -> PerResource<f64> {
    PerResource::from_fn(|resource| a[resource].max(b[resource]))
}

/// Minutes above the limit, each with its probability, its severity and its resource's weight.
pub(crate) fn minutes(
    contention: &Contention,
    changed: &Changed,
    novelty: &PerResource<f64>,
    weights: &PerResource<f64>,
    counted: Counted,
) -> f64 {
    let of = |(resource, state): (Resource, &Option<ResourceContention>)| {
        let state = state.as_ref()?;
        let novelty = novelty[resource];
        let by_course = changed.course.minutes(resource, state.limit, counted.from_s, contention.horizon_s);
        let minutes = match by_course {
            Some(by_course) if novelty <= LEAST => by_course,
            Some(by_course) => by_course + novelty * (by_forecast(state, changed.gone[resource], counted) - by_course),
            None => by_forecast(state, changed.gone[resource], counted),
        };
        Some(weights[resource] * minutes)
    };
    contention.resources.iter().filter_map(of).sum()
}

/// Less is nothing.
const LEAST: f64 = 1e-6;

fn by_forecast(state: &ResourceContention, gone: f64, counted: Counted) -> f64 {
    let limit = state.limit + gone;
    let severity = |excess: f64| SEVERITY * (excess / state.limit.max(f64::MIN_POSITIVE)).min(1.0);
    let now = state.now - limit;
    let mut last = (0.0_f64, if now > 0.0 { 1.0 + severity(now) } else { 0.0 });
    let mut seconds = 0.0;
    for (onset, maximum) in state.onset.iter().zip(&state.maxima) {
        let rate = maximum.exceedance(limit) + severity(maximum.excess(limit));
        let point = (onset.after_s, rate.max(last.1));
        let start = last.0.max(counted.from_s);
        if point.0 > start {
            let slope = (point.1 - last.1) / (point.0 - last.0);
            let at_start = last.1 + slope * (start - last.0);
            seconds += 0.5 * (at_start + point.1) * (point.0 - start);
        }
        last = point;
    }
    let rest = (last.0 + counted.lasting_s - last.0.max(counted.from_s)).max(0.0);
    (seconds + last.1 * rest) / 60.0
}
