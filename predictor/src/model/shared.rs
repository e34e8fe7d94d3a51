//! One ensemble of trees for many series: what one of them has lived through helps the others.
//!
//! Globally trained models beat those of single series where series are many and alike (Montero-Manso and Hyndman, *Principles and
//! algorithms for forecasting groups of time series*, International Journal of Forecasting 37, 2021). Lessons come in as features, what the
//! cheap forecast said, and what came; the trees only correct what was said, and only as long as their corrections have lately
//! been worth it.

use super::boost::{Boosted, Growth, Lessons, Loss};
use super::{Budget, CostClass};
use serde::{Deserialize, Serialize};

/// Outcomes of corrected forecasts that are needed before corrections are used.
const TRIAL: u32 = 200;
/// One in so many lessons has to be new before trees are fitted again.
const SHARE_NEW: usize = 20;

/// Lessons of many series, and the trees that were fitted to them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shared {
    loss: Loss,
    growth: Growth,
    width: usize,
    /// Lessons kept; then the oldest is forgotten for each new one.
    most: usize,
    rows: Vec<f32>,
    offsets: Vec<f32>,
    targets: Vec<f32>,
    weights: Vec<f32>,
    next: usize,
    /// Lessons since the last fit.
    fresh: u64,
    model: Option<Boosted>,
    /// Usual loss of what was said without and with the trees.
    losses: [f64; 2],
    scored: u32,
    /// Weight of the newest loss.
    rate: f64,
}

impl Shared {
    /// For rows of `width` features, keeping `most` lessons; `memory` is the number of outcomes by which the trees are judged.
    #[must_use]
    pub fn new(loss: Loss, growth: Growth, width: usize, most: usize, memory: f64) -> Self {
        Self {
            loss,
            growth,
            width,
            most: most.max(1),
            rows: Vec::new(),
            offsets: Vec::new(),
            targets: Vec::new(),
            weights: Vec::new(),
            next: 0,
            fresh: 0,
            model: None,
            losses: [0.0; 2],
            scored: 0,
            rate: 1.0 / memory.max(1.0),
        }
    }

    /// Takes what came of a forecast: its features, what the cheap one said, what was said with the trees, if there were some, and
    /// the outcome, which counts `weight` times.
    pub fn learn(&mut self, row: &[f32], offset: f32, with_trees: Option<f32>, target: f32, weight: f32) {
        let numbers = [offset, target, weight];
        if row.len() != self.width || !row.iter().chain(&numbers).all(|x| x.is_finite()) || weight <= 0.0 {
            return;
        }
        if let Some(said) = with_trees.filter(|said| said.is_finite()) {
            self.scored = self.scored.saturating_add(1);
            let rate = self.rate.max(1.0 / f64::from(self.scored));
            for (usual, said) in self.losses.iter_mut().zip([offset, said]) {
                *usual += (f64::from(weight) * loss(self.loss, said, target) - *usual) * rate;
            }
        }
        self.fresh += 1;
        if self.offsets.len() < self.most {
            self.rows.extend_from_slice(row);
            self.offsets.push(offset);
            self.targets.push(target);
            self.weights.push(weight);
        } else {
            self.rows[self.next * self.width..][..self.width].copy_from_slice(row);
            self.offsets[self.next] = offset;
            self.targets[self.next] = target;
            self.weights[self.next] = weight;
        }
        self.next = (self.next + 1) % self.most;
    }

    fn lessons(&self) -> Lessons<'_> {
        let Self { rows, offsets, targets, weights, .. } = self;
        Lessons { rows, width: self.width, offsets, targets, weights }
    }

    /// Fits the trees anew to all lessons kept, if `budget` has that much left and enough was learned since the last fit. Call it
    /// off the hot path.
    pub fn refit(&mut self, budget: &mut Budget) -> bool {
        let enough = self.lessons().count() / SHARE_NEW;
        if self.fresh <= enough as u64 || !budget.spend(self.lessons().work(&self.growth)) {
            return false;
        }
        self.fresh = 0;
        let fitted = Boosted::fit(&self.lessons(), self.loss, &self.growth);
        let done = fitted.is_some();
        self.model = fitted.or(self.model.take());
        done
    }

    /// What it costs.
    pub const COST: CostClass = CostClass::Dear;

    /// What the trees make of a forecast, trusted or not; `None` before the first fit.
    #[must_use]
    pub fn opinion(&self, row: &[f32], offset: f32) -> Option<f32> {
        Some(self.model.as_ref()?.predict(row, offset)).filter(|said| said.is_finite())
    }

    /// Whether the trees have lately been better than what they correct.
    #[must_use]
    pub fn trusted(&self) -> bool {
        self.scored >= TRIAL && self.losses[1] < self.losses[0]
    }

    /// Usual loss without and with the trees, and how many outcomes that is from.
    #[must_use]
    pub fn record(&self) -> ([f64; 2], u32) {
        (self.losses, self.scored)
    }

    /// Lessons kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.offsets.len()
    }

    /// Whether nothing was learned yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    /// Bytes that it takes, lessons included.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        let lessons = 4 * (self.rows.len() + 3 * self.offsets.len());
        size_of::<Self>() + lessons + self.model.as_ref().map_or(0, Boosted::state_bytes)
    }
}

/// What saying `said` costs when `target` comes.
fn loss(kind: Loss, said: f32, target: f32) -> f64 {
    let (said, target) = (f64::from(said), f64::from(target));
    match kind {
        Loss::Squared => (said - target).powi(2),
        Loss::Pinball(level) => crate::replay::pinball(level, said, target),
        // Squared error of the probability: Brier's score, by which probabilities are judged here.
        Loss::Logistic => (1.0 / (1.0 + (-said).exp()) - target).powi(2),
    }
}
