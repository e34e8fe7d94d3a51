//! Events put into a trace, since no public trace has declared ones: batch windows that are announced, and mostly keep to it.

use super::world::Injected;
use crate::events::{Change, Event, Scope};
use crate::sample::PerResource;
use serde::{Deserialize, Serialize};

/// What is put in.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Injection {
    /// Events a day in each pool.
    pub per_day: f64,
    /// What an event adds, as a share of its pool's capacity.
    pub share: f64,
    /// How long one lasts, in seconds.
    pub lasts_s: f64,
    /// Share of the declared ones that happen.
    pub happen: f64,
    /// Share of those that come late, by up to half their length.
    pub late: f64,
    /// The same number gives the same events.
    pub seed: u64,
}

impl Default for Injection {
    fn default() -> Self {
        Self { per_day: 1.0, share: 0.3, lasts_s: 5_400.0, happen: 0.9, late: 0.2, seed: 1 }
    }
}

/// xorshift64* (Vigna, *ACM Transactions on Mathematical Software* 42, 2016): evenly in 0..1.
fn uniform(state: &mut u64) -> f64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Events for `machines` (numbers and names) of a pool of that capacity, in steps `from..until`.
#[must_use]
pub fn events(
    injection: &Injection,
    machines: &[(usize, String)],
    capacity: f64,
    period_s: f64,
    steps: std::ops::Range<usize>,
) -> Vec<Injected> {
    let mut state = injection.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(machines.len() as u64) | 1;
    let length = ((injection.lasts_s / period_s).round() as usize).max(1);
    let days = (steps.len() as f64 * period_s / 86_400.0).max(0.0);
    let count = (days * injection.per_day.max(0.0)).round() as usize;
    if machines.is_empty() || steps.len() <= 2 * length {
        return Vec::new();
    }
    (0..count)
        .map(|number| {
            let start = steps.start + (uniform(&mut state) * (steps.len() - 2 * length) as f64) as usize;
            let (machine, name) = &machines[(uniform(&mut state) * machines.len() as f64) as usize % machines.len()];
            let amount = injection.share * capacity;
            let happens = uniform(&mut state) < injection.happen;
            let is_late = uniform(&mut state) < injection.late;
            let late = if is_late { (0.5 * uniform(&mut state) * length as f64) as usize } else { 0 };
            let begin = start + late;
            Injected {
                machine: *machine,
                declared: Event {
                    id: format!("injected-{name}-{number}"),
                    name: format!("batch on {name}"),
                    scope: Scope::Machine(name.clone()),
                    start_s: start as f64 * period_s,
                    end_s: (start + length) as f64 * period_s,
                    change: PerResource { cpu: Some(Change::Add(amount)), ..PerResource::default() },
                    confidence: 0.9,
                },
                happens: if happens { begin..begin + length } else { begin..begin },
                amount,
            }
        })
        .collect()
}
