//! Whether the pool's probabilities are to be trusted, and who suffers if they come true.

use predictor::guard::{Guard, GuardConfig, Guarded};
use predictor::slo::{Demand, risks};
use predictor::{Contention, Resource};

use super::{Chosen, Planner, PoolState, convert, known};
use crate::api::types::MachineRisk;

/// Share of what a machine asks for below which it counts as suffering.
const PROMISED: f64 = 0.9;
/// Machines that suffer with less probability are not named,
const LEAST: f64 = 0.05;
/// and at most so many are.
const MOST: usize = 10;
/// What can be short for a while and is shared out then; memory cannot.
const SHARED: [Resource; 3] = [Resource::Cpu, Resource::Io, Resource::Network];
/// A window of the guard weighs half after a day: what was wrong a week ago says little of today.
const HALF_LIFE_S: f64 = 86_400.0;

/// The guard of a pool whose probabilities are about so many steps.
pub(super) fn guard(step_s: f64, horizon_steps: usize) -> Guard {
    Guard::new(GuardConfig { window: horizon_steps, half_life: HALF_LIFE_S / step_s, ..GuardConfig::default() })
}

/// The largest share of a limit that is used now; NaN if nothing is known.
fn used(contention: &Contention) -> f64 {
    let shares =
        contention.resources.iter().filter_map(|(_, state)| state.as_ref().map(|state| state.now / state.limit));
    shares.fold(f64::NAN, f64::max)
}

impl Planner {
    /// The score that the trigger acts on: the forecast's, or that of a threshold while probabilities are off; NaN if nothing
    /// is known.
    pub(super) fn trusted_score(&mut self) -> f64 {
        let Some(own) = self.contentions.get(&self.config.pool).filter(|own| known(own)) else {
            self.guarded = None;
            return f64::NAN;
        };
        let guarded = self.guard.step(own.score, own.any, used(own));
        if guarded.fallback && !self.falls_back() {
            tracing::warn!(reason = guarded.reason, "forecasts are not trusted");
        }
        let score = guarded.score;
        self.guarded = Some(guarded);
        score
    }

    /// Whether a threshold decides in the place of the forecast.
    pub(super) fn falls_back(&self) -> bool {
        self.guarded.as_ref().is_some_and(|guarded| guarded.fallback)
    }

    /// What the guard says of a pool; it watches this host's own.
    pub(super) fn guarded_of(&self, pool: &str) -> Option<&Guarded> {
        self.guarded.as_ref().filter(|_| pool == self.config.pool)
    }

    /// Machines that are likely to get less than [`PROMISED`] of what they ask for, the most likely first.
    pub(super) fn at_risk(&self, state: &PoolState) -> Vec<MachineRisk> {
        let (Some(contention), Some(forecaster)) = (self.contentions.get(&state.pool), self.pools.get(&state.pool))
        else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for resource in SHARED {
            let Some(known) = &contention.resources[resource] else { continue };
            let Some(outlook) = known.maxima.last() else { continue };
            let expected =
                |machine: &str| self.pools.machine_forecast(&state.pool, machine, resource, self.horizon_steps);
            let demands: Vec<Demand> = forecaster
                .machines()
                .filter_map(|machine| {
                    let expected = expected(machine)?.point;
                    Some(Demand { machine: machine.to_owned(), expected, promised: PROMISED })
                })
                .collect();
            let likely = risks(&demands, known.capacity, outlook).into_iter().filter(|risk| risk.probability >= LEAST);
            found.extend(likely.map(|risk| MachineRisk {
                machine: risk.machine,
                resource: convert::resource(resource),
                probability: risk.probability,
                reason: risk.reason,
            }));
        }
        found.sort_by(|a, b| b.probability.total_cmp(&a.probability).then_with(|| a.machine.cmp(&b.machine)));
        found.truncate(MOST);
        found
    }

    /// A chosen move could not be started: nothing has moved, so that the pool need not rest. The same machine is not tried
    /// at the same host again for as long as a rest lasts; another one may be tried at once.
    pub fn refused(&mut self, chosen: &Chosen) {
        self.trigger.retract();
        let (now_s, back_off_s) = (self.now_s(), self.config.planner.cooldown_s.max(self.step_s()));
        self.log.refuse(&chosen.machine, &chosen.request.destination, now_s, back_off_s);
    }
}
