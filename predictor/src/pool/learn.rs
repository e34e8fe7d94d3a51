//! What a pool learns from a step's samples.

use super::{MachineHistory, PoolForecaster, Tick};
use crate::events::{EventBook, Evidence, Scope};
use crate::experience::Experience;
use crate::fleet::Place;
use crate::sample::{PerResource, Resource, Sample, plausible};
use std::collections::HashMap;

/// How many banks ahead of the one that learns memory is asked for, in this order.
const PLACES_AHEAD: usize = 4;
const AHEAD: usize = 2;
const SEASONS_AHEAD: usize = 1;

/// The believed effect of events now on the scope that `concerned` tells.
fn effect_now(events: &EventBook, concerned: impl Fn(&Scope) -> bool, resource: Resource, baseline: f64) -> f64 {
    events
        .now()
        .filter(|effect| concerned(&effect.event.scope))
        .filter_map(|effect| Some(effect.probability * effect.size * effect.event.change[resource]?.amount(baseline)))
        .sum()
}

/// Asks for what is needed after the bank of that number, counted over the resources of all members in turn: first where all is of one
/// some banks away, then what is there of one that is nearer.
fn fetch_ahead(members: &[(&Sample, &mut MachineHistory)], number: usize) {
    let of = |ahead: usize| {
        let (number, resource) = ((number + ahead) / Resource::ALL.len(), (number + ahead) % Resource::ALL.len());
        Some((&members.get(number)?.1, Resource::ALL[resource]))
    };
    if let Some((history, resource)) = of(PLACES_AHEAD) {
        history.fetch_places(resource);
    }
    if let Some((history, resource)) = of(AHEAD) {
        history.fetch(resource);
    }
    if let Some((history, resource)) = of(SEASONS_AHEAD) {
        history.fetch_seasons(resource);
    }
}

impl PoolForecaster {
    pub(super) fn weigh_events(&mut self, tick: &Tick<'_>) {
        let Self { events, sums, machines, measured, .. } = self;
        events.observe(tick.now_s, |scope, resource| {
            let (bank, value) = match scope {
                Scope::Pool => (&sums[resource].bank, measured[resource]?),
                Scope::Machine(name) => {
                    let sample = tick.samples.iter().find(|sample| sample.machine == *name)?;
                    (&machines.get(name)?.banks[resource], plausible(sample.values[resource])?)
                }
            };
            let baseline = bank.point(1)?;
            Some(Evidence { residual: value - baseline, baseline, usual_error: bank.usual_error(1) })
        });
    }

    /// Takes the believed effect of events out of the samples and learns from what is left.
    pub(super) fn learn(
        &mut self,
        samples: &[Sample],
        mut experience: Option<&mut PerResource<Experience>>,
        [before, of]: [usize; 2],
    ) {
        let time = self.step_number();
        let Self { machines, events, .. } = self;
        let mut machine_effects = PerResource::<f64>::default();
        let some_event = events.now().next().is_some();
        // Who gives samples in order spares the search for each name.
        let mut members: Vec<(&Sample, &mut MachineHistory)> = Vec::with_capacity(samples.len());
        if machines.keys().eq(samples.iter().map(|sample| &sample.machine)) {
            members.extend(samples.iter().zip(machines.values_mut()));
        } else {
            let mut by_name: HashMap<&str, &mut MachineHistory> =
                machines.iter_mut().map(|(name, history)| (name.as_str(), history)).collect();
            members
                .extend(samples.iter().filter_map(|sample| Some((sample, by_name.remove(sample.machine.as_str())?))));
        }
        for number in 0..members.len() {
            for (place, resource) in Resource::ALL.into_iter().enumerate() {
                fetch_ahead(&members, Resource::ALL.len() * number + place);
                let (sample, history) = &mut members[number];
                let own = |scope: &Scope| matches!(scope, Scope::Machine(name) if *name == sample.machine);
                let value = plausible(sample.values[resource]);
                let effect = if some_event {
                    let expected = history.banks[resource].point(1).or(value).unwrap_or(0.0);
                    effect_now(events, own, resource, expected)
                } else {
                    0.0
                };
                let without = value.map(|value| (value - effect).max(0.0));
                machine_effects[resource] += value.zip(without).map_or(0.0, |(value, without)| value - without);
                history.take(resource, without);
                if let Some(experience) = experience.as_deref_mut() {
                    let (member, bank) = (&mut history.members[resource], &history.banks[resource]);
                    experience[resource].fleet.follow_one_of(Place { number, before, of }, member, bank, without, time);
                }
            }
        }
        for resource in Resource::ALL {
            let measured = self.measured[resource];
            let expected = self.sums[resource].bank.point(1).or(measured).unwrap_or(0.0);
            let effect = effect_now(&self.events, |scope| *scope == Scope::Pool, resource, expected);
            let without = measured.map(|sum| (sum - machine_effects[resource] - effect).max(0.0));
            let taken_out = measured.zip(without).map(|(sum, without)| sum - machine_effects[resource] - without);
            self.taken_out[resource].push(taken_out);
            self.sums[resource].update(without);
        }
    }
}
