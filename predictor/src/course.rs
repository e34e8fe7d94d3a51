//! How a pool would go on if other machines were in it: the past played on, with the machines of today.
//!
//! A forecast of a pool's sum says nothing of the same pool without one of its machines: a machine that jumps is not its median. So the
//! question is asked of history. The sum of any set of machines is known at all times of the past; moments at which it stood about
//! where it stands now are taken as examples, and what came after them, moved to where it stands now, is what may come next:
//!
//! ```text
//! x(now + h) = y(s + h) + rho(h) (y(now) - y(s))      with the weight of s: how near y(s) was to y(now)
//! ```
//!
//! `rho(h)` is the autocorrelation: what is above its usual level now comes down by as much as it usually does. Historical simulation in
//! the words of finance (Barone-Adesi, Giannopoulos and Vosper, *Journal of Futures Markets* 19, 1999, filter it in a like manner), analogs in those of
//! weather forecasting (Lorenz, *Journal of the Atmospheric Sciences* 26, 1969). Machines stay together in their examples, so that
//! peaks that come together count together. Declared events are added with their probabilities.

use crate::sample::{PerResource, Resource};
use serde::{Deserialize, Serialize};

/// Moments ahead that are looked at.
const MOMENTS: usize = 12;
/// Width of the kernel in standard deviations of the sum.
const WIDTH: f64 = 0.3;
/// Square of the distance in widths within which a moment is near.
const NEAR: f64 = 16.0;
/// Weight of a moment that was further away: with nothing like today in the past, all of the past is the example.
const FAR: f64 = 1e-4;
/// Of moments that tell little, every so many are looked at.
const SPARSE: usize = 5;
/// Samples without which nothing is said, for each step that is looked ahead, and at all.
const LEAST: [usize; 2] = [3, 48];
/// Events that are told apart at one moment; of more, the mean is added.
const EVENTS: usize = 4;
/// A minute in which twice the limit is asked for weighs twice as much as one in which it is just exceeded.
pub(crate) const SEVERITY: f64 = 1.0;

/// A declared event that may be in effect within the horizon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventAhead {
    /// The machine that it is about; `None` = the pool as a whole.
    pub machine: Option<String>,
    /// Probability that it is in effect within the horizon, 0 to 1.
    pub probability: f64,
    /// From when on, in seconds from now.
    pub from_s: f64,
    /// Until when.
    pub to_s: f64,
    /// What it adds, in the resource's unit.
    pub amount: PerResource<f64>,
}

/// What a machine, or a set of machines together, used lately, and what is declared of it.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Course {
    /// Seconds between samples.
    pub step_s: f64,
    /// Samples without the effect of events, oldest first, the newest last; gaps filled; empty = nothing known.
    pub recent: PerResource<Vec<f32>>,
    /// Events.
    pub events: Vec<EventAhead>,
}

impl Course {
    /// The same set without `machine`, whose course is `other`.
    #[must_use]
    pub fn without(&self, machine: &str, other: &Self) -> Self {
        let events = self.events.iter().filter(|event| event.machine.as_deref() != Some(machine));
        Self { step_s: self.step_s, recent: self.joined(other, -1.0), events: events.cloned().collect() }
    }

    /// The same set with another machine, whose course is `other`.
    #[must_use]
    pub fn with(&self, other: &Self) -> Self {
        let events = self.events.iter().chain(other.events.iter().filter(|event| event.machine.is_some()));
        Self { step_s: self.step_s, recent: self.joined(other, 1.0), events: events.cloned().collect() }
    }

    /// Sums from the newest sample backwards; what is older than the other's first sample counts with that one.
    fn joined(&self, other: &Self, sign: f32) -> PerResource<Vec<f32>> {
        PerResource::from_fn(|resource| {
            let (own, theirs) = (&self.recent[resource], &other.recent[resource]);
            let Some(first) = theirs.first() else { return own.clone() };
            let older = own.len().saturating_sub(theirs.len());
            let newest = &theirs[theirs.len() - (own.len() - older)..];
            let theirs = std::iter::repeat_n(first, older).chain(newest);
            own.iter().zip(theirs).map(|(value, other)| (value + sign * other).max(0.0)).collect()
        })
    }

    /// Minutes above `limit` from `from_s` until `horizon_s` from now, each with its probability and severity. `None` where the
    /// past is too short to tell.
    #[must_use]
    pub fn minutes(&self, resource: Resource, limit: f64, from_s: f64, horizon_s: f64) -> Option<f64> {
        let past = Past::of(&self.recent[resource], self.step_s, horizon_s)?;
        if !(limit.is_finite() && limit > 0.0) {
            return None;
        }
        let mut seconds = 0.0;
        let mut before = 0;
        for moment in 1..=MOMENTS.min(past.steps) {
            let ahead = (moment * past.steps).div_ceil(MOMENTS.min(past.steps));
            let (begin_s, end_s) = (before as f64 * self.step_s, ahead as f64 * self.step_s);
            before = ahead;
            let counted_s = end_s - begin_s.max(from_s);
            if counted_s > 0.0 {
                seconds += counted_s * past.above(ahead, limit, &self.cases(resource, end_s));
            }
        }
        Some(seconds / 60.0)
    }

    /// Probability and amount of the combinations of events `at_s` from now.
    fn cases(&self, resource: Resource, at_s: f64) -> Vec<(f64, f64)> {
        let there = |event: &&EventAhead| event.from_s <= at_s && at_s < event.to_s && event.amount[resource] != 0.0;
        let mut events: Vec<&EventAhead> = self.events.iter().filter(there).collect();
        events.sort_by(|a, b| b.amount[resource].abs().total_cmp(&a.amount[resource].abs()));
        let (large, small) = events.split_at(events.len().min(EVENTS));
        let mean: f64 = small.iter().map(|event| event.probability * event.amount[resource]).sum();
        let mut cases = vec![(1.0, mean)];
        for event in large {
            let happens = event.probability.clamp(0.0, 1.0);
            let with: Vec<(f64, f64)> =
                cases.iter().map(|(p, sum)| (p * happens, sum + event.amount[resource])).collect();
            cases.iter_mut().for_each(|(p, _)| *p *= 1.0 - happens);
            cases.extend(with);
        }
        cases.retain(|(p, _)| *p > 1e-6);
        cases
    }
}

/// One series, prepared to be asked.
struct Past<'a> {
    values: &'a [f32],
    steps: usize,
    mean: f64,
    variance: f64,
    now: f64,
    /// Examples of now: place and weight; and the sum of weights.
    examples: Vec<(usize, f64)>,
    total: f64,
}

impl<'a> Past<'a> {
    fn of(values: &'a [f32], step_s: f64, horizon_s: f64) -> Option<Self> {
        let steps = (horizon_s / step_s).round();
        if !(steps >= 1.0 && steps <= values.len() as f64) {
            return None;
        }
        let steps = steps as usize;
        if values.len() < LEAST[1].max(LEAST[0] * steps) || values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let count = values.len() as f64;
        let now = f64::from(*values.last()?);
        let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
        let variance = values.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum::<f64>() / count;
        let width = (WIDTH * variance.sqrt()).max(1e-6 * mean.abs()).max(f64::MIN_POSITIVE);
        let mut examples = Vec::with_capacity(values.len());
        for (place, value) in values[..values.len() - steps].iter().enumerate() {
            let apart = ((f64::from(*value) - now) / width).powi(2);
            // Every so many of those far away stand for all of them.
            if apart < NEAR {
                examples.push((place, (-0.5 * apart).exp()));
            } else if place % SPARSE == 0 {
                examples.push((place, FAR * SPARSE as f64));
            }
        }
        let total = examples.iter().map(|(_, weight)| weight).sum();
        Some(Self { values, steps, mean, variance, now, examples, total })
    }

    /// Autocorrelation, from every few samples; with what never changes, all stays as it is.
    fn correlation(&self, ahead: usize) -> f64 {
        let apart = |value: f32| f64::from(value) - self.mean;
        let pairs = self.values.iter().zip(&self.values[ahead..]).step_by(SPARSE);
        let (sum, count) =
            pairs.fold((0.0, 0_u32), |(sum, count), (then, later)| (sum + apart(*then) * apart(*later), count + 1));
        let rho = if self.variance > 0.0 { sum / f64::from(count.max(1)) / self.variance } else { 1.0 };
        rho.clamp(0.0, 1.0)
    }

    /// Probability of being above `limit` `ahead` steps from now, plus severity, over all cases of events.
    fn above(&self, ahead: usize, limit: f64, cases: &[(f64, f64)]) -> f64 {
        let (rho, scale) = (self.correlation(ahead), SEVERITY / limit);
        let mut sum = 0.0;
        for (place, weight) in &self.examples {
            let [then, later] = [*place, place + ahead].map(|place| f64::from(self.values[place]));
            let comes = later + rho * (self.now - then) - limit;
            for (probability, amount) in cases {
                let excess = comes + amount;
                if excess > 0.0 {
                    sum += weight * probability * (1.0 + (scale * excess).min(SEVERITY));
                }
            }
        }
        sum / self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn course(values: impl Iterator<Item = f32>) -> Course {
        let recent = PerResource { cpu: values.collect(), ..PerResource::default() };
        Course { step_s: 60.0, recent, events: Vec::new() }
    }

    /// Every fiftieth sample a jump of ten samples.
    fn jumps(t: usize) -> f32 {
        if t % 50 < 10 { 8.0 } else { 2.0 }
    }

    #[test]
    fn a_jump_goes_on_as_long_as_jumps_do_and_calm_is_calm() {
        // The newest sample is the third of a jump: seven more minutes of twenty are to come on the average of its examples, which
        // are all samples of jumps.
        let inside = course((0..1_003).map(jumps));
        let minutes = inside.minutes(Resource::Cpu, 5.0, 0.0, 20.0 * 60.0).expect("long enough");
        assert!((5.0..30.0).contains(&minutes), "{minutes}");
        let calm = course((0..1_000).map(|t| 2.0 + (t % 7) as f32 * 0.01));
        assert_eq!(calm.minutes(Resource::Cpu, 5.0, 0.0, 1_200.0), Some(0.0));
        let late = inside.minutes(Resource::Cpu, 5.0, 600.0, 1_200.0).expect("long enough");
        assert!(late < minutes, "what is over before the move is done does not count: {late}");
    }

    #[test]
    fn the_machine_that_jumps_is_the_one_whose_leaving_helps() {
        let calm = course((0..1_003).map(|_| 2.0));
        let wild = course((0..1_003).map(jumps));
        let pool = calm.with(&wild);
        let minutes = |course: &Course| course.minutes(Resource::Cpu, 7.0, 0.0, 1_200.0).expect("long enough");
        assert!(minutes(&pool) > 2.0);
        assert_eq!(minutes(&pool.without("wild", &wild)), 0.0);
        assert!(minutes(&pool.without("calm", &calm)) > 2.0, "8 is above 7 alone");
    }

    #[test]
    fn events_count_when_they_are_due_and_leave_with_their_machine() {
        let mut machine = course((0..200).map(|_| 2.0));
        machine.events.push(EventAhead {
            machine: Some("m".into()),
            probability: 0.5,
            from_s: 600.0,
            to_s: 1_200.0,
            amount: PerResource { cpu: 6.0, ..PerResource::default() },
        });
        let pool = course((0..200).map(|_| 2.0)).with(&machine);
        let minutes = pool.minutes(Resource::Cpu, 8.0, 0.0, 1_200.0).expect("long enough");
        // Half of ten minutes; ten of eight weigh a quarter more.
        assert!((minutes - 6.25).abs() < 1.5, "{minutes}");
        assert_eq!(pool.without("m", &machine).minutes(Resource::Cpu, 8.0, 0.0, 1_200.0), Some(0.0));
    }

    #[test]
    fn what_cannot_be_told_is_not_told() {
        assert_eq!(Course::default().minutes(Resource::Cpu, 1.0, 0.0, 60.0), None);
        let short = course((0..20).map(|_| 1.0));
        assert_eq!(short.minutes(Resource::Cpu, 1.0, 0.0, 60.0), None);
        let long = course((0..200).map(|_| 1.0));
        for wrong in [f64::NAN, 0.0, -1.0, f64::INFINITY] {
            assert_eq!(long.minutes(Resource::Cpu, wrong, 0.0, 60.0), None);
            assert_eq!(long.minutes(Resource::Cpu, 1.0, 0.0, wrong), None);
        }
        let odd = course((0..200).map(|t| if t == 7 { f32::NAN } else { 1.0 }));
        assert_eq!(odd.minutes(Resource::Cpu, 1.0, 0.0, 60.0), None);
        let longer = course((0..300).map(|_| 0.5));
        assert_eq!(long.without("x", &longer).recent.cpu, vec![0.5; 200]);
    }
}
