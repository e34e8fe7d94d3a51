//! Whether dear models gain anything: panels beside the banks of some series, with and without trees.
//!
//! Every step of the test is an origin here. A [`Panel`] is fitted when trees are, to the last fortnight. What it says is compared with the
//! bank it sits on, with the bank as corrected by trees over all series, and with the better of the two by what each has lost
//! so far, which is what a daemon with both would tell.

use super::{Protocol, naive_scale};
use crate::bank::{Bank, BankConfig, BankError};
use crate::experience::{Experience, LESSONS};
use crate::fleet::{Fleet, Member};
use crate::model::Budget;
use crate::model::dear::{DEAR_NAMES, Panel};
use crate::model::fit::History;
use crate::quantile::pinball;
use crate::sample::plausible;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Days that models are fitted to.
const FITTED_DAYS: usize = 14;
/// A panel speaks beside trees while it has lost less than this share of what they have,
const BETTER: f64 = 0.98;
/// lately: weight of the newest loss.
const RATE: f64 = 0.01;
/// Who is compared: bank, bank with trees, panel on the bank, the better of the last two.
const WHO: usize = 4;

/// Scores of one horizon, over series each in units of its own scale, relative to the bank alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PanelScore {
    /// 0.95 pinball loss of the bank with trees.
    pub trees: f64,
    /// Of the panel: the bank, and a dear model where it has lately been better.
    pub panel: f64,
    /// Of whichever of those two has lately lost less.
    pub better: f64,
    /// Absolute error of the panel's point.
    pub panel_error: f64,
    /// Share of outcomes not above the panel's 0.95 quantile.
    pub panel_coverage: f64,
    /// Share of origins for which a dear model spoke, by its name.
    pub spoke: BTreeMap<String, f64>,
    /// 0.95 pinball loss of each dear model by itself.
    pub alone: BTreeMap<String, f64>,
}

/// The scores by horizon in steps, and of how many series.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PanelSummary {
    /// Series with a panel.
    pub series: usize,
    /// By horizon in steps.
    pub horizons: BTreeMap<usize, PanelScore>,
}

/// What was said for one horizon at one step.
#[derive(Clone, Copy, Debug)]
struct Said {
    quantiles: [f64; WHO],
    points: [f64; 2],
    alone: [Option<f64>; DEAR_NAMES.len()],
    speaker: Option<usize>,
}

/// Sums of one series at one horizon.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    count: f64,
    losses: [f64; WHO],
    errors: [f64; 2],
    covered: f64,
    spoke: [f64; DEAR_NAMES.len()],
    /// Of each model, and of the bank at the same origins.
    alone: [[f64; 2]; DEAR_NAMES.len()],
}

/// One series with a panel.
struct Followed {
    column: usize,
    panel: Panel,
    scale: f64,
    said: Vec<VecDeque<Option<Said>>>,
    /// Recent losses of trees and panel.
    lately: Vec<[f64; 2]>,
    sums: Vec<Sums>,
}

/// Replays `columns`, with panels for at most `panels` of them, spread evenly.
///
/// # Errors
/// [`BankError`] if `config` cannot be used.
pub fn replay_panels(
    columns: &[Vec<Option<f64>>],
    protocol: &Protocol,
    config: &BankConfig,
    panels: usize,
) -> Result<PanelSummary, BankError> {
    let clean = |column: &Vec<Option<f64>>| column.iter().map(|value| plausible(*value)).collect();
    let columns: Vec<Vec<Option<f64>>> = columns.iter().map(clean).collect();
    let new = |_| Ok((Bank::new(config.clone())?, Member::default()));
    let mut machines = columns.iter().map(new).collect::<Result<Vec<_>, BankError>>()?;
    let every = columns.len().div_ceil(panels.max(1)).max(1);
    let moving = |column: &usize| naive_scale(&columns[*column], protocol.test_from) > 0.0;
    let sampled = (0..columns.len()).step_by(every).filter(moving);
    let mut followed: Vec<Followed> =
        sampled.map(|column| Followed::new(column, &columns[column], protocol, config)).collect();
    let Experience { mut fleet, .. } = Experience::new(config, LESSONS);
    for t in 0..columns.iter().map(Vec::len).max().unwrap_or(0) {
        for (number, ((bank, member), column)) in machines.iter_mut().zip(&columns).enumerate() {
            let value = column.get(t).copied().flatten();
            bank.update(value);
            fleet.follow(member, bank, value, t as u64, number as u64);
        }
        let refit = protocol.refit_every > 0 && (t + 1).is_multiple_of(protocol.refit_every);
        if refit {
            fleet.refit(&mut Budget::unlimited());
        }
        for one in &mut followed {
            let (bank, member) = &machines[one.column];
            one.step(t, &columns[one.column], protocol, (bank, member, &fleet));
            if refit {
                one.refit(t, &columns[one.column], protocol);
            }
        }
    }
    let horizons = protocol.horizons.iter().enumerate();
    let horizons = horizons.map(|(index, steps)| (*steps, summary(&followed, index))).collect();
    Ok(PanelSummary { series: followed.len(), horizons })
}

impl Followed {
    fn new(column: usize, values: &[Option<f64>], protocol: &Protocol, config: &BankConfig) -> Self {
        let (horizons, day) = (&protocol.horizons, [protocol.day]);
        Self {
            column,
            // A bank that is told of no cycle is no reason not to look for the day.
            panel: Panel::new(horizons, if config.seasons.is_empty() { &day } else { &config.seasons }),
            scale: naive_scale(values, protocol.test_from),
            said: vec![VecDeque::new(); horizons.len()],
            lately: vec![[0.0; 2]; horizons.len()],
            sums: vec![Sums::default(); horizons.len()],
        }
    }

    fn refit(&mut self, t: usize, values: &[Option<f64>], protocol: &Protocol) {
        let Some(known) = values.get(..=t) else { return };
        let from = known.len().saturating_sub(FITTED_DAYS * protocol.day);
        self.panel.refit(&History::new(&known[from..], from as u64, &[]), &mut Budget::unlimited());
    }

    /// After the bank and the fleet have taken the sample of step `t`.
    fn step(
        &mut self,
        t: usize,
        values: &[Option<f64>],
        protocol: &Protocol,
        (bank, member, fleet): (&Bank, &Member, &Fleet),
    ) {
        let Some(value) = values.get(t) else { return };
        self.panel.update(*value, bank);
        for (index, steps) in protocol.horizons.iter().enumerate() {
            let due = (self.said[index].len() == *steps).then(|| self.said[index].pop_back()).flatten().flatten();
            if let (Some(said), Some(outcome)) = (due, value) {
                let loss = |who: usize| pinball(0.95, said.quantiles[who], *outcome);
                for (lately, loss) in self.lately[index].iter_mut().zip([loss(1), loss(2)]) {
                    *lately += (loss - *lately) * RATE;
                }
                let scored = t >= protocol.test_from.saturating_add(*steps) && t - *steps < protocol.test_until;
                if scored {
                    self.sums[index].add(&said, *outcome);
                }
            }
            let said = self.say(index, *steps, t, (bank, member, fleet));
            self.said[index].push_front(said);
        }
    }

    fn say(
        &self,
        index: usize,
        steps: usize,
        t: usize,
        (bank, member, fleet): (&Bank, &Member, &Fleet),
    ) -> Option<Said> {
        let (panel, bank_says) = (self.panel.forecast(index, bank)?, bank.forecast(steps)?);
        let trees = fleet.forecast(member, bank, index, t as u64)?.quantile(0.95);
        let [lost_trees, lost_panel] = self.lately[index];
        let better = if lost_panel < BETTER * lost_trees { panel.quantile(0.95) } else { trees };
        Some(Said {
            quantiles: [bank_says.quantile(0.95), trees, panel.quantile(0.95), better],
            points: [bank_says.point, panel.point],
            alone: std::array::from_fn(|model| Some(self.panel.opinion(index, model)?.quantile(0.95))),
            speaker: self.panel.speaker(index),
        })
    }
}

impl Sums {
    fn add(&mut self, said: &Said, outcome: f64) {
        self.count += 1.0;
        for (sum, quantile) in self.losses.iter_mut().zip(said.quantiles) {
            *sum += pinball(0.95, quantile, outcome);
        }
        for (sum, point) in self.errors.iter_mut().zip(said.points) {
            *sum += (outcome - point).abs();
        }
        self.covered += f64::from(u8::from(outcome <= said.quantiles[2]));
        if let Some(speaker) = said.speaker {
            self.spoke[speaker] += 1.0;
        }
        for (sums, quantile) in self.alone.iter_mut().zip(said.alone) {
            if let Some(quantile) = quantile {
                sums[0] += pinball(0.95, quantile, outcome);
                sums[1] += pinball(0.95, said.quantiles[0], outcome);
            }
        }
    }
}

fn summary(followed: &[Followed], index: usize) -> PanelScore {
    let known: Vec<(f64, Sums)> =
        followed.iter().map(|one| (one.scale, one.sums[index])).filter(|(_, sums)| sums.count > 0.0).collect();
    let total =
        |of: &dyn Fn(&Sums) -> f64| -> f64 { known.iter().map(|(scale, sums)| of(sums) / sums.count / scale).sum() };
    let share = |of: &dyn Fn(&Sums) -> f64| -> f64 {
        known.iter().map(|(_, sums)| of(sums) / sums.count).sum::<f64>() / known.len().max(1) as f64
    };
    let over = |a: f64, b: f64| if b > 0.0 { a / b } else { 1.0 };
    let bank = total(&|sums| sums.losses[0]);
    let named = |of: &dyn Fn(usize) -> f64| {
        DEAR_NAMES.iter().enumerate().map(|(model, name)| ((*name).to_owned(), of(model))).collect()
    };
    PanelScore {
        trees: over(total(&|sums| sums.losses[1]), bank),
        panel: over(total(&|sums| sums.losses[2]), bank),
        better: over(total(&|sums| sums.losses[3]), bank),
        panel_error: over(total(&|sums| sums.errors[1]), total(&|sums| sums.errors[0])),
        panel_coverage: share(&|sums| sums.covered),
        spoke: named(&|model| share(&|sums| sums.spoke[model])),
        alone: named(&|model| over(total(&|sums| sums.alone[model][0]), total(&|sums| sums.alone[model][1]))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A daily wave that the bank is told nothing of, beside a random walk: models win on the first and are silent on the second.
    #[test]
    fn a_panel_is_scored_beside_its_bank_and_speaks_only_where_it_wins() {
        let mut state = 5_u64;
        let mut noise = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f64 / (1_u64 << 23) as f64 - 1.0
        };
        let wave = |t: u32| 20.0 * (f64::from(t % 96) * std::f64::consts::TAU / 96.0).sin();
        let waves: Vec<Option<f64>> = (0..2_400).map(|t| Some(60.0 + wave(t) + 2.0 * noise())).collect();
        let mut level = 500.0;
        let walk: Vec<Option<f64>> = (0..2_400)
            .map(|_| {
                level += noise();
                Some(level)
            })
            .collect();
        let mut protocol = Protocol::new(900.0, 2_400, &[15.0, 180.0], Some(15.0));
        protocol.refit_every = 900;
        let config = BankConfig { horizons: protocol.horizons.clone(), ..BankConfig::default() };
        let waves = replay_panels(&[waves], &protocol, &config, 1).expect("sound");
        let far = &waves.horizons[&12];
        assert!(waves.series == 1 && far.panel < 0.85 && far.panel_error < 0.9, "{waves:?}");
        assert!(far.better < 1.1 * far.panel.min(far.trees), "{waves:?}");
        assert!(far.spoke.values().sum::<f64>() > 0.5 && (far.panel_coverage - 0.95).abs() < 0.05, "{waves:?}");
        let walk = replay_panels(&[walk], &protocol, &config, 1).expect("sound");
        assert!((walk.horizons[&1].panel - 1.0).abs() < 0.05, "{walk:?}");
    }
}
