//! What machines have in common: trees over the state of many machines' banks correct the upper quantiles of each.
//!
//! A [`Bank`] has four kilobytes and a microsecond. What tells a machine that is about to jump from one that only did so once is learned here
//! from all machines that are given to the same [`Fleet`], off the hot path, and asked for only where a forecast is
//! looked at. A last correction of each machine, as in [`crate::conformal`], keeps the promise of each quantile.

use crate::bank::{Bank, CIRCUMSTANCES, Predictions};
use crate::conformal::PHASES;
use crate::fetch::fetch;
use crate::forecast::{Forecast, LEVELS};
use crate::model::Budget;
use crate::model::boost::{Growth, Loss};
use crate::model::shared::Shared;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Features of one forecast: the bank's and the time.
const WIDTH: usize = CIRCUMSTANCES + 2;
/// Levels that are corrected: all but the median.
const FROM: usize = 1;
/// How many.
const CORRECTED: usize = LEVELS.len() - FROM;
/// Of the forecasts of one machine one in so many is learned from; seven divides no cycle, and its powers neither.
const EVERY: u64 = 7;
/// So many machines are learned from that often; of more, each more seldom. What is kept of them is bounded anyway, and each lesson asks
/// the trees of all levels.
const STUDENTS: usize = 2_000;
/// Of more machines so many neighbours are learned from at the same step: the trees that they ask are then in a cache.
const BLOCK: usize = 64;
/// Step of a machine's own correction, in usual errors.
const STEP: f32 = 0.06;
/// Step of the correction of one phase, which all machines share.
const PHASE_STEP: f32 = 0.003;
/// Weight of the newest usual error in the long memory.
const MEMORY: f32 = 0.002;
/// Outcomes further away than so many usual errors teach no more than these.
const FURTHEST: f32 = 50.0;

/// What many machines' pasts say about each horizon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fleet {
    /// By horizon, with a head for each level.
    models: Vec<Shared>,
    /// Lengths in steps of the cycles that the time is told in.
    cycles: Vec<usize>,
    /// What all machines' quantiles are off by at each phase of the shortest cycle, in usual errors, by horizon.
    phases: Vec<[[f32; CORRECTED]; PHASES]>,
}

/// Where a machine stands among all that teach the same trees.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// In its pool.
    pub number: usize,
    /// Machines in the pools before.
    pub before: usize,
    /// All machines.
    pub of: usize,
}

impl Place {
    /// Whether it is learned from at step `time`, its own of that number.
    fn teaches(&self, time: u64, own: u64) -> bool {
        let every = every(self.of);
        let turn =
            if every == EVERY { own + self.number as u64 } else { time + ((self.before + self.number) / BLOCK) as u64 };
        turn.is_multiple_of(every)
    }
}

/// What one machine has said and waits for, and how its quantiles are corrected.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Member {
    said: VecDeque<Noted>,
    clock: u64,
    corrections: Vec<[f32; CORRECTED]>,
    /// Usual error in long memory, by horizon: what an error counts in.
    usual: Vec<f32>,
}

impl Member {
    /// Asks for what [`Fleet::follow`] is going to read of it, itself left out; see [`Bank::fetch`].
    pub(crate) fn fetch(&self) {
        if let Some(noted) = self.said.front() {
            fetch(&noted.due);
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Noted {
    due: u64,
    horizon: usize,
    phase: usize,
    row: Vec<f32>,
    point: f32,
    scale: f32,
    /// Quantiles in usual errors from the point: of the bank, and with the trees.
    bank: [f32; CORRECTED],
    trees: [Option<f32>; CORRECTED],
}

/// Steps from one lesson of a machine to the next, if there are so many machines.
fn every(machines: usize) -> u64 {
    let mut every = EVERY;
    while machines as u64 > (STUDENTS as u64).saturating_mul(every / EVERY) {
        every = every.saturating_mul(EVERY);
    }
    every
}

impl Fleet {
    /// For banks with so many horizons and those cycles, keeping so many lessons of each horizon, of so many steps.
    #[must_use]
    pub fn new(horizons: usize, cycles: &[usize], lessons: usize, span: usize) -> Self {
        let losses: [Loss; CORRECTED] = std::array::from_fn(|level| Loss::Pinball(LEVELS[level + FROM]));
        let model = |_| Shared::new(&losses, Growth::default(), WIDTH, [lessons, span], 20_000.0);
        let phases = vec![[[0.0; CORRECTED]; PHASES]; horizons];
        Self { phases, models: (0..horizons).map(model).collect(), cycles: cycles.to_vec() }
    }

    /// After each sample that `bank` has taken: learns what came of what was said of the machine. `time` is the number of this step, counted
    /// alike for all machines; `number` tells machines apart.
    pub fn follow(&mut self, member: &mut Member, bank: &Bank, value: Option<f64>, time: u64, number: u64) {
        let place = Place { number: number as usize, before: 0, of: 1 };
        self.follow_one_of(place, member, bank, value, time);
    }

    /// As [`Fleet::follow`] of one of many machines.
    pub(crate) fn follow_one_of(
        &mut self,
        place: Place,
        member: &mut Member,
        bank: &Bank,
        value: Option<f64>,
        time: u64,
    ) {
        member.clock += 1;
        member.corrections.resize(self.models.len(), [0.0; CORRECTED]);
        member.usual.resize(self.models.len(), 0.0);
        while member.said.front().is_some_and(|noted| noted.due <= member.clock) {
            let Some(noted) = member.said.pop_front() else { break };
            if let Some(value) = value {
                let weight = noted.scale / member.usual[noted.horizon];
                self.learn(&noted, &mut member.corrections[noted.horizon], [value as f32, weight], time);
            }
        }
        if value.is_none() || !place.teaches(time, member.clock) {
            return;
        }
        let said = bank.predictions();
        for horizon in 0..self.models.len() {
            let Some(noted) = self.note(member, bank, &said, horizon, time) else { continue };
            let usual = &mut member.usual[horizon];
            *usual += (noted.scale - *usual) * if *usual > 0.0 { MEMORY } else { 1.0 };
            let place = member.said.partition_point(|other| other.due <= noted.due);
            member.said.insert(place, noted);
        }
    }

    fn learn(&mut self, noted: &Noted, corrections: &mut [f32; CORRECTED], [value, weight]: [f32; 2], time: u64) {
        let outcome = ((value - noted.point) / noted.scale).clamp(-FURTHEST, FURTHEST);
        let weight = weight.clamp(0.02, 20.0);
        self.models[noted.horizon].learn(&noted.row, &noted.bank, &noted.trees, [outcome, weight], time);
        for level in 0..CORRECTED {
            if let Some(said) = noted.trees[level] {
                let share = LEVELS[level + FROM] as f32;
                let step = if outcome > said { share } else { share - 1.0 };
                corrections[level] += STEP * step;
                self.phases[noted.horizon][noted.phase][level] += PHASE_STEP * step;
            }
        }
    }

    fn note(&self, member: &Member, bank: &Bank, said: &Predictions, horizon: usize, time: u64) -> Option<Noted> {
        let mut row = vec![0.0; WIDTH];
        let (point, scale) = bank.circumstances(said, horizon, &mut row)?;
        for (place, cycle) in row[CIRCUMSTANCES..].iter_mut().zip(&self.cycles) {
            *place = (time % (*cycle).max(1) as u64) as f32 / (*cycle).max(1) as f32;
        }
        let quantiles = bank.quantiles(horizon)?;
        let bank_horizons = &bank.config().horizons;
        let bank: [f32; CORRECTED] = std::array::from_fn(|level| (quantiles[level + FROM] - point) / scale);
        // A series that hardly ever moves has an error of almost nothing, and all is enormous in units of it.
        if !bank.iter().all(|said| said.abs() <= FURTHEST) {
            return None;
        }
        let due = time + *bank_horizons.get(horizon)? as u64;
        let cycle = self.cycles.iter().copied().min().unwrap_or(1).max(1) as u64;
        let phase = (due % cycle * PHASES as u64 / cycle) as usize;
        let correction = |level: usize| {
            self.phases[horizon][phase][level] + member.corrections.get(horizon).map_or(0.0, |all| all[level])
        };
        let models = &self.models[horizon];
        // Never below nothing nor below a lower level: what is compared with outcomes is what is told.
        let mut least = ((quantiles[0] - point) / scale).max(-point / scale);
        let trees = std::array::from_fn(|level: usize| {
            let said = models.opinion(level, &row, bank[level])? + correction(level);
            least = least.max(said);
            Some(least)
        });
        Some(Noted { due: member.clock + (due - time), horizon, phase, row, point, scale, bank, trees })
    }

    /// The forecast of `bank` at its tracked horizon `index`, corrected where the trees have lately been better.
    #[must_use]
    pub fn forecast(&self, member: &Member, bank: &Bank, horizon: usize, time: u64) -> Option<Forecast> {
        let steps = *bank.config().horizons.get(horizon)?;
        let mut forecast = bank.forecast(steps)?;
        let Some(noted) = self.note(member, bank, &bank.predictions(), horizon, time) else { return Some(forecast) };
        for level in 0..CORRECTED {
            let trusted = self.models[horizon].trusted(level);
            if let Some(said) = noted.trees[level].filter(|_| trusted) {
                forecast.quantiles[level + FROM] = f64::from((noted.point + said * noted.scale).max(0.0));
            }
        }
        for level in 1..LEVELS.len() {
            forecast.quantiles[level] = forecast.quantiles[level].max(forecast.quantiles[level - 1]);
        }
        Some(forecast)
    }

    /// Fits anew what `budget` allows. Call it off the hot path, about once a day.
    pub fn refit(&mut self, budget: &mut Budget) -> usize {
        self.models.iter_mut().map(|shared| shared.refit(budget)).sum()
    }

    /// Bytes that it takes, lessons included.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        self.models.iter().map(Shared::state_bytes).sum()
    }

    /// The models by horizon, with a head for each level.
    #[must_use]
    pub fn models(&self) -> &[Shared] {
        &self.models
    }

    /// The same, to be fitted.
    pub(crate) fn models_mut(&mut self) -> &mut [Shared] {
        &mut self.models
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bank::BankConfig;

    #[test]
    fn of_many_machines_each_is_learned_from_more_seldom() {
        let steps = [1, 2_000, 2_001, 14_000, 14_001, usize::MAX].map(every);
        assert_eq!(&steps[..5], [7, 7, 49, 49, 343]);
        assert!(steps[5] > 343);
    }

    #[test]
    fn of_many_machines_neighbours_are_learned_from_at_the_same_step() {
        let taught = |of: usize, number: usize, before: usize| {
            let place = Place { number, before, of };
            (0..343_u64).filter(move |time| place.teaches(1_000 + time, 5 + time)).collect::<Vec<_>>()
        };
        let (few, next) = (taught(2_000, 3, 700), taught(2_000, 4, 700));
        assert!(few.len() == 49 && few.iter().all(|step| (step + 5 + 3) % 7 == 0), "{few:?}");
        assert_ne!(few, next);
        let many = taught(10_000, 3, 6_400);
        assert!(many.len() == 7 && many.windows(2).all(|pair| pair[1] - pair[0] == 49), "{many:?}");
        assert_eq!(many, taught(10_000, BLOCK - 1, 6_400));
        assert_ne!(many, taught(10_000, BLOCK, 6_400), "the next block has another step");
    }

    fn noise(state: &mut u64) -> f64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 40) as f64 / (1_u64 << 24) as f64
    }

    /// Pinball loss at 0.95, and the share covered, of six machines whose next value is uncertain after some values only.
    fn replay(refits: bool) -> (f64, f64) {
        let config = BankConfig { horizons: vec![1], ..BankConfig::default() };
        let mut fleet = Fleet::new(1, &[], 20_000, 0);
        let mut machines: Vec<(Bank, Member, u64, f64, f64)> = (1..=6)
            .map(|seed| (Bank::new(config.clone()).expect("sound"), Member::default(), seed, 10.0, f64::NAN))
            .collect();
        let (mut loss, mut covered, mut count) = (0.0, 0.0, 0.0);
        for t in 0..9_000_u64 {
            for (number, (bank, member, state, value, said)) in machines.iter_mut().enumerate() {
                *value = match t % 2 {
                    0 => {
                        if noise(state) < 0.5 {
                            10.0
                        } else {
                            11.0
                        }
                    }
                    _ => 20.0 + (noise(state) - 0.5) * if *value > 10.5 { 12.0 } else { 0.2 },
                };
                if t > 5_000 {
                    loss += crate::quantile::pinball(0.95, *said, *value);
                    covered += f64::from(u8::from(*value <= *said));
                    count += 1.0;
                }
                bank.update(Some(*value));
                fleet.follow(member, bank, Some(*value), t, number as u64);
                *said = fleet.forecast(member, bank, 0, t).expect("samples").quantile(0.95);
            }
            if refits && t % 1_500 == 1_499 {
                fleet.refit(&mut Budget::unlimited());
            }
        }
        (loss / count, covered / count)
    }

    #[test]
    fn what_tells_wide_from_narrow_is_learned_from_all_machines() {
        let ((alone, _), (together, covered)) = (replay(false), replay(true));
        assert!(together < 0.93 * alone, "{together} against {alone}");
        assert!((covered - 0.95).abs() < 0.02, "covered {covered}");
    }

    #[test]
    fn a_series_that_hardly_moves_is_left_to_its_bank() {
        let mut fleet = Fleet::new(3, &[], 1_000, 0);
        let (mut bank, mut member) = (Bank::new(BankConfig::default()).expect("sound"), Member::default());
        for t in 0..3_000 {
            let value = if t % 1_000 == 999 { None } else { Some(if t % 500 == 0 { 1e12 } else { 7.0 }) };
            bank.update(value);
            fleet.follow(&mut member, &bank, value, t, 0);
            fleet.refit(&mut Budget::new(1_000_000));
            let forecast = fleet.forecast(&member, &bank, 2, t).expect("samples");
            assert!(forecast.quantiles.iter().all(|quantile| quantile.is_finite()), "at {t}: {forecast:?}");
            assert!(forecast.quantiles.windows(2).all(|pair| pair[0] <= pair[1]), "at {t}: {forecast:?}");
        }
    }
}
