//! What plans are made from: the courses of a pool and of its machines.

use super::PoolForecaster;
use crate::course::{Course, EventAhead};
use crate::events::{Effect, Scope};
use crate::sample::{PerResource, Resource};
use crate::window::Window;

/// Samples with gaps filled by the value before them, those before the first sample by that one; nothing without a sample.
fn filled(window: &Window) -> Vec<f32> {
    let [older, newer] = window.parts();
    let all = || older.iter().chain(newer).copied();
    let Some(mut last) = all().find(|value| !value.is_nan()) else { return Vec::new() };
    let fill = |value: f32| {
        last = if value.is_nan() { last } else { value };
        last
    };
    all().map(fill).collect()
}

impl PoolForecaster {
    /// What the pool's machines used together, and the events that are declared of it.
    #[must_use]
    pub fn course(&self) -> Course {
        let longest = self.machines.values().map(super::MachineHistory::len).max().unwrap_or(0);
        let recent = PerResource::from_fn(|resource| {
            if self.machines.values().all(|history| history.banks[resource].last().is_none()) {
                return Vec::new();
            }
            let taken_out = &self.taken_out[resource];
            (0..longest).rev().map(|age| -taken_out.back(age).unwrap_or(0.0) as f32).collect()
        });
        // Sums as `joined` makes them, so that a machine taken away leaves what the others used.
        let mut recent = recent;
        for history in self.machines.values() {
            for resource in Resource::ALL {
                let (own, values) = (&mut recent[resource], filled(&history.windows[resource]));
                let Some(first) = values.first() else { continue };
                let older = own.len().saturating_sub(values.len());
                for (sum, value) in own.iter_mut().zip(std::iter::repeat_n(first, older).chain(&values)) {
                    *sum += value;
                }
            }
        }
        Course { step_s: self.config.step_s, recent, events: self.events_ahead(|_| true) }
    }

    /// The same of one machine; `None` if it is not in the pool.
    #[must_use]
    pub fn machine_course(&self, machine: &str) -> Option<Course> {
        let history = self.machines.get(machine)?;
        let recent = PerResource::from_fn(|resource| filled(&history.windows[resource]));
        let own = |scope: &Scope| matches!(scope, Scope::Machine(name) if name == machine);
        Some(Course { step_s: self.config.step_s, recent, events: self.events_ahead(own) })
    }

    fn events_ahead(&self, wanted: impl Fn(&Scope) -> bool) -> Vec<EventAhead> {
        let horizon_s = self.config.step_s * self.config.horizon_steps as f64;
        let within = self.events.within(self.now_s, horizon_s);
        within.filter(|effect| wanted(&effect.event.scope)).map(|effect| self.event_ahead(&effect)).collect()
    }

    fn event_ahead(&self, effect: &Effect<'_>) -> EventAhead {
        let event = effect.event;
        let machine = match &event.scope {
            Scope::Machine(name) => Some(name.clone()),
            Scope::Pool => None,
        };
        let baseline = |resource: Resource| match &machine {
            Some(name) => self.machines.get(name).and_then(|history| history.banks[resource].last()),
            None => self.sums[resource].bank.last(),
        };
        EventAhead {
            probability: effect.probability,
            from_s: (event.start_s - self.now_s).max(0.0),
            // What should be over and is not goes on for a step.
            to_s: (event.end_s - self.now_s).max(1.5 * self.config.step_s),
            amount: PerResource::from_fn(|resource| {
                event.change[resource]
                    .map_or(0.0, |change| effect.size * change.amount(baseline(resource).unwrap_or(0.0)))
            }),
            machine,
        }
    }
}
