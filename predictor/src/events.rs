//! Scheduled events: what is known to come before any history shows it.
//!
//! An event is a declaration and may not happen, or come late, or end late. So it is believed in with a probability that starts
//! as the declared confidence, follows what is measured while it should be happening, and fades after its end:
//!
//! ```text
//!            start                            end           overrun
//! declared ----|------------- due -------------|----- fading ----|--> closed: remembered by name
//!   confidence   belief: odds x likelihood of each sample with and without the change
//! ```
//!
//! What the models learn from is the measurement less (belief x change). So an event that happens does not become their idea of
//! normal, and one that does not happen changes nothing.

use crate::sample::{PerResource, Resource};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// The pool as a whole.
    Pool,
    /// One machine, wherever it runs.
    Machine(String),
}

/// How a resource's use changes while the event lasts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// By this much, in the resource's unit; may be negative.
    Add(f64),
    /// To this many times what it would be without the event.
    Multiply(f64),
}

impl Change {
    /// The change in the resource's unit when the use without the event is `baseline`.
    #[must_use]
    pub fn amount(self, baseline: f64) -> f64 {
        let amount = match self {
            Self::Add(amount) => amount,
            Self::Multiply(times) => (times - 1.0) * baseline,
        };
        if amount.is_finite() { amount.max(-baseline) } else { 0.0 }
    }
}

/// A declared event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Unique among the events of a pool.
    pub id: String,
    /// What it is, such as `nightly batch`: events of one name learn from each other.
    pub name: String,
    /// What it is about.
    pub scope: Scope,
    /// When it starts, seconds on the caller's clock.
    pub start_s: f64,
    /// When it ends.
    pub end_s: f64,
    /// The expected change; `None` where none is expected.
    pub change: PerResource<Option<Change>>,
    /// How sure it is that it happens, 0 to 1.
    pub confidence: f64,
}

/// What is believed of one event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Belief {
    event: Event,
    /// Probability that the change is in effect now.
    in_effect: f64,
    /// The highest it has been.
    highest: f64,
    /// Sum of measured change / declared change, and how many times that was seen.
    realised: (f64, f64),
    /// When the caller last declared it.
    last_seen_s: f64,
}

/// What past events of one name did.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Record {
    /// Events that ended.
    pub ended: f64,
    /// Those of them that happened.
    pub happened: f64,
    /// Mean of measured change / declared change.
    pub size: f64,
}

/// One event's part in a window ahead.
#[derive(Clone, Debug, PartialEq)]
pub struct Effect<'a> {
    /// The event.
    pub event: &'a Event,
    /// Probability that it is in effect at some time in the window.
    pub probability: f64,
    /// Measured change / declared change to expect.
    pub size: f64,
}

/// All events of a pool and what became of earlier ones.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct EventBook {
    beliefs: BTreeMap<String, Belief>,
    records: BTreeMap<String, Record>,
}

/// A sample moves the odds of an event by e^3 at most: one outlier decides nothing alone.
const MOST_EVIDENCE: f64 = 3.0;
/// Probability that a due event starts, or one in effect stops, from one step to the next.
const HAZARD: f64 = 0.02;
/// Events that come late do so by 1 / this of their duration in the mean.
const LATENESS: f64 = 4.0;
/// Below this an event that is over is closed.
const CLOSED: f64 = 0.05;

impl EventBook {
    /// Takes the events that are declared now. Those no longer declared are forgotten, unless they are due or fading.
    pub fn declare(&mut self, events: &[Event], now_s: f64) {
        for event in events {
            let sound = event.start_s.is_finite() && event.end_s.is_finite() && event.end_s > event.start_s;
            if !sound || event.confidence.is_nan() || (now_s >= event.end_s && !self.beliefs.contains_key(&event.id)) {
                continue;
            }
            let belief = self.beliefs.entry(event.id.clone()).or_insert_with(|| Belief {
                event: event.clone(),
                in_effect: 0.0,
                highest: 0.0,
                realised: (0.0, 0.0),
                last_seen_s: now_s,
            });
            belief.event = event.clone();
            belief.last_seen_s = now_s;
        }
        self.beliefs.retain(|_, belief| belief.last_seen_s >= now_s || belief.event.start_s <= now_s);
    }

    /// Confidence after what past events of that name did: the declaration counts as two of them.
    fn confidence(&self, event: &Event) -> f64 {
        let record = self.record(&event.name);
        let declared = event.confidence.clamp(0.0, 1.0);
        (2.0 * declared + record.happened) / (2.0 + record.ended)
    }

    /// What past events of that name did.
    #[must_use]
    pub fn record(&self, name: &str) -> Record {
        self.records.get(name).copied().unwrap_or(Record { ended: 0.0, happened: 0.0, size: 1.0 })
    }

    fn size(&self, name: &str) -> f64 {
        let record = self.record(name);
        (2.0 + record.happened * record.size) / (2.0 + record.happened)
    }

    /// Weighs one step's evidence. `residual` gives, for the scope of an event and a resource, the measurement less the forecast without events,
    /// the baseline, and the usual error; `None` if nothing was measured.
    pub fn observe(&mut self, now_s: f64, mut residual: impl FnMut(&Scope, Resource) -> Option<Evidence>) {
        let due: Vec<String> =
            self.beliefs.iter().filter(|(_, belief)| belief.event.start_s <= now_s).map(|(id, _)| id.clone()).collect();
        for id in due {
            let Some(mut belief) = self.beliefs.remove(&id) else { continue };
            let size = self.size(&belief.event.name);
            let prior = self.prior(&belief, now_s);
            let mut evidence = 0.0;
            let mut realised = None;
            for resource in Resource::ALL {
                let Some(change) = belief.event.change[resource] else { continue };
                let Some(seen) = residual(&belief.event.scope, resource) else { continue };
                let amount = size * change.amount(seen.baseline);
                let usual = seen.usual_error.max(1e-3 * amount.abs());
                if usual <= 0.0 || amount == 0.0 {
                    continue;
                }
                evidence += (seen.residual.abs() - (seen.residual - amount).abs()) / usual;
                realised = realised.or(Some(seen.residual / amount * size));
            }
            let odds = prior / (1.0 - prior).max(1e-9) * evidence.clamp(-MOST_EVIDENCE, MOST_EVIDENCE).exp();
            belief.in_effect = odds / (1.0 + odds);
            belief.highest = belief.highest.max(belief.in_effect);
            if let Some(realised) = realised.filter(|_| belief.in_effect > 0.5) {
                belief.realised.0 += realised.clamp(0.0, 3.0);
                belief.realised.1 += 1.0;
            }
            let lasted = belief.event.end_s - belief.event.start_s;
            let over = now_s >= belief.event.end_s;
            if over && (belief.in_effect < CLOSED || now_s >= belief.event.end_s + lasted) {
                self.close(&belief);
            } else {
                self.beliefs.insert(id, belief);
            }
        }
    }

    /// Probability before this step's sample that the change is in effect.
    fn prior(&self, belief: &Belief, now_s: f64) -> f64 {
        if now_s >= belief.event.end_s {
            return belief.in_effect * 0.7;
        }
        let coming = self.still_coming(belief, now_s);
        let fresh = if belief.highest == 0.0 { coming } else { HAZARD * coming };
        (belief.in_effect * (1.0 - HAZARD) + (1.0 - belief.in_effect) * fresh).clamp(1e-4, 1.0 - 1e-4)
    }

    /// Probability that an event that is due and was not seen yet still comes: lateness is taken to be exponential with a
    /// quarter of the duration as its mean.
    fn still_coming(&self, belief: &Belief, now_s: f64) -> f64 {
        let confidence = self.confidence(&belief.event).clamp(0.0, 1.0 - 1e-6);
        let late = ((now_s - belief.event.start_s) / (belief.event.end_s - belief.event.start_s)).max(0.0);
        let waiting = confidence * (-LATENESS * late).exp();
        waiting / (waiting + 1.0 - confidence)
    }

    fn close(&mut self, belief: &Belief) {
        let record = self.records.entry(belief.event.name.clone()).or_insert(Record { size: 1.0, ..Record::default() });
        record.ended += 1.0;
        if belief.highest > 0.5 && belief.realised.1 > 0.0 {
            let size = belief.realised.0 / belief.realised.1;
            record.size = (record.size * record.happened + size) / (record.happened + 1.0);
            record.happened += 1.0;
        }
    }

    /// Probability and size of each event that is in effect now with some probability.
    pub fn now(&self) -> impl Iterator<Item = Effect<'_>> {
        self.beliefs.values().filter(|belief| belief.in_effect > 0.0).map(|belief| Effect {
            event: &belief.event,
            probability: belief.in_effect,
            size: self.size(&belief.event.name),
        })
    }

    /// Probability and size of each event within the next `window_s` seconds.
    pub fn within(&self, now_s: f64, window_s: f64) -> impl Iterator<Item = Effect<'_>> {
        self.beliefs.values().filter_map(move |belief| {
            let event = &belief.event;
            let probability = if event.start_s > now_s {
                if event.start_s > now_s + window_s { 0.0 } else { self.confidence(event) }
            } else if now_s >= event.end_s {
                belief.in_effect
            } else {
                let lateness = 1.0 - (-LATENESS * window_s / (event.end_s - event.start_s)).exp();
                belief.in_effect + (1.0 - belief.in_effect) * self.still_coming(belief, now_s) * lateness
            };
            (probability > 0.0).then(|| Effect { event, probability, size: self.size(&event.name) })
        })
    }
}

/// What one step says about an event.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evidence {
    /// Measured less forecast without events.
    pub residual: f64,
    /// Forecast without events.
    pub baseline: f64,
    /// Usual absolute error of that forecast.
    pub usual_error: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(confidence: f64) -> Event {
        Event {
            id: "e1".into(),
            name: "batch".into(),
            scope: Scope::Pool,
            start_s: 100.0,
            end_s: 200.0,
            change: PerResource { cpu: Some(Change::Add(4.0)), ..PerResource::default() },
            confidence,
        }
    }

    fn run(book: &mut EventBook, declared: &Event, happens: std::ops::Range<i32>, until: i32) -> Vec<f64> {
        (0..until)
            .map(|t| {
                let now_s = f64::from(t);
                book.declare(std::slice::from_ref(declared), now_s);
                let residual = if happens.contains(&t) { 4.0 } else { 0.1 };
                book.observe(now_s, |_, _| Some(Evidence { residual, baseline: 2.0, usual_error: 0.3 }));
                book.now().map(|effect| effect.probability).sum()
            })
            .collect()
    }

    #[test]
    fn belief_follows_what_happens() {
        let on_time = run(&mut EventBook::default(), &event(0.7), 100..200, 260);
        assert!(on_time[99] == 0.0 && on_time[101] > 0.95 && on_time[150] > 0.95, "{:?}", &on_time[95..105]);
        assert!(on_time[205] < 0.05, "over: {}", on_time[205]);
        let never = run(&mut EventBook::default(), &event(0.9), 0..0, 260);
        assert!(never[103..].iter().all(|p| *p < 0.1), "it did not happen");
        let late = run(&mut EventBook::default(), &event(0.7), 130..200, 260);
        assert!(late[125] < 0.1 && late[134] > 0.9, "late: {} {}", late[125], late[134]);
        let overrun = run(&mut EventBook::default(), &event(0.7), 100..230, 260);
        assert!(overrun[225] > 0.8 && overrun[240] < 0.05, "ends late: {} {}", overrun[225], overrun[240]);
    }

    #[test]
    fn an_event_that_keeps_failing_loses_credit_and_sizes_are_learned() {
        let mut book = EventBook::default();
        let declared = event(0.9);
        assert!((book.confidence(&declared) - 0.9).abs() < 1e-9);
        for _ in 0..4 {
            run(&mut book, &declared, 0..0, 220);
        }
        assert!(book.confidence(&declared) < 0.4, "{}", book.confidence(&declared));
        let mut halved =
            Event { change: PerResource { cpu: Some(Change::Add(6.0)), ..PerResource::default() }, ..declared };
        halved.name = "smaller than declared".into();
        for _ in 0..4 {
            run(&mut book, &halved, 100..200, 220);
        }
        let size = book.size(&halved.name);
        assert!(size < 0.85, "a change of 4 where 6 were declared: {size}");
    }

    #[test]
    fn absurd_declarations_are_left_out() {
        let mut book = EventBook::default();
        let backwards = Event { end_s: 50.0, ..event(0.5) };
        let nan = Event { start_s: f64::NAN, ..event(0.5) };
        let past = Event { start_s: -20.0, end_s: -10.0, ..event(0.5) };
        book.declare(&[backwards, nan, past], 0.0);
        assert_eq!(book.within(0.0, 1e9).count(), 0);
        assert_eq!(Change::Multiply(f64::INFINITY).amount(1.0), 0.0);
        assert_eq!(Change::Add(-5.0).amount(2.0), -2.0, "use never falls below nothing");
    }
}
