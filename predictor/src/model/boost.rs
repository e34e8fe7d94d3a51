//! Gradient-boosted trees: many small trees, each fitted to what those before it left over.
//!
//! Friedman, *Greedy function approximation: a gradient boosting machine*, Annals of Statistics 29, 2001; every tree on a part of
//! the rows (*Stochastic gradient boosting*, 2002); splits by histograms and second-order gains as in Chen and Guestrin, *XGBoost*,
//! KDD 2016, and Ke et al., *LightGBM*, NIPS 2017. Three losses: squared, logistic, and pinball, whose leaves are refitted to the
//! quantile of what is left over in them. Every row may bring an offset that the trees only correct: a model that learns nothing says
//! the offset.
//!
//! Trees cannot leave the range of what they were taught, so that they never blow up by themselves; the correction is cut to the
//! range of corrections seen besides.

use serde::{Deserialize, Serialize};

/// Bins of a feature's histogram.
const BINS: usize = 64;
/// The deepest tree that can be asked for.
const DEEPEST: usize = 8;
/// Values of a feature that are looked at for the bounds of its bins.
const SURVEY: usize = 4_096;

/// What is made small.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// Squared error: the mean.
    Squared,
    /// Pinball loss: the quantile at this level.
    Pinball(f64),
    /// Log loss of outcomes 0 and 1: the log-odds.
    Logistic,
}

/// How trees are grown.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Growth {
    /// Trees.
    pub rounds: usize,
    /// Share of each tree that counts.
    pub rate: f32,
    /// Splits from root to leaf, at most 8.
    pub depth: usize,
    /// Rows of a leaf at least.
    pub least_rows: usize,
    /// Rows of no correction that each leaf is mixed with.
    pub penalty: f32,
    /// Share of the rows that each tree sees.
    pub row_share: f32,
    /// Share of the features that each tree may split by.
    pub feature_share: f32,
    /// The same seed and rows give the same trees.
    pub seed: u64,
}

impl Default for Growth {
    fn default() -> Self {
        Self {
            rounds: 60,
            rate: 0.1,
            depth: 4,
            least_rows: 40,
            penalty: 20.0,
            row_share: 0.5,
            feature_share: 0.7,
            seed: 1,
        }
    }
}

/// What trees learn from: one row of features after the other, what each row says already, and what came.
#[derive(Clone, Copy, Debug)]
pub struct Lessons<'a> {
    /// Features, row by row; not NaN.
    pub rows: &'a [f32],
    /// Features of a row.
    pub width: usize,
    /// What the trees correct; zeros where there is nothing.
    pub offsets: &'a [f32],
    /// Outcomes: values, or 0 and 1 for [`Loss::Logistic`].
    pub targets: &'a [f32],
    /// How much each row counts; above 0.
    pub weights: &'a [f32],
}

impl Lessons<'_> {
    /// Complete rows.
    #[must_use]
    pub fn count(&self) -> usize {
        let rows = self.rows.len().checked_div(self.width).unwrap_or(0);
        rows.min(self.offsets.len()).min(self.targets.len()).min(self.weights.len())
    }

    /// What fitting to them costs, in visits of one feature of one row.
    #[must_use]
    pub fn work(&self, growth: &Growth) -> u64 {
        Self::work_of(self.count(), self.width, growth)
    }

    /// The same of so many rows of so many features.
    #[must_use]
    pub fn work_of(rows: usize, width: usize, growth: &Growth) -> u64 {
        let share = f64::from(growth.row_share.clamp(0.0, 1.0)) * f64::from(growth.feature_share.clamp(0.0, 1.0));
        let visits = share * (rows * width * growth.rounds * growth.depth.clamp(1, DEEPEST)) as f64;
        visits as u64 + 1
    }
}

/// One split; rows of which the feature is not above the bound go left.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Split {
    feature: u16,
    bound: f32,
}

/// A complete tree: splits level by level, then leaves. A node that is not split has an unreachable bound.
struct Tree {
    splits: Vec<Split>,
    leaves: Vec<f32>,
}

/// The number of the leaf that a row comes to.
#[inline]
fn leaf(splits: &[Split], row: &[f32]) -> usize {
    let mut node = 0;
    while let Some(split) = splits.get(node) {
        let right = row.get(usize::from(split.feature)).is_some_and(|value| *value > split.bound);
        node = 2 * node + 1 + usize::from(right);
    }
    node - splits.len()
}

/// A fitted ensemble. Its trees, all equally deep, lie one behind the other: of ten thousand machines many ask hundreds of trees at a step,
/// and a processor reads ahead in what it reads in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Boosted {
    loss: Loss,
    splits: Vec<Split>,
    leaves: Vec<f32>,
    /// Leaves of a tree; it has one split less.
    width: usize,
    /// Smallest and largest correction among the rows it was taught.
    reach: [f32; 2],
}

/// Numbers that look random and are the same in every run (xorshift64*).
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn share(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32) / (1_u64 << 24) as f32
    }
}

impl Boosted {
    /// Fits trees; `None` if there are fewer rows than two leaves need, or rows of no width.
    #[must_use]
    pub fn fit(lessons: &Lessons<'_>, loss: Loss, growth: &Growth) -> Option<Self> {
        Self::plant(lessons, loss, growth, true)
    }

    /// A random forest of the same trees: each one fitted to the whole, and their mean (`growth.rate` is not used).
    #[must_use]
    pub fn forest(lessons: &Lessons<'_>, growth: &Growth) -> Option<Self> {
        let growth = Growth { rate: 1.0 / growth.rounds.max(1) as f32, ..*growth };
        Self::plant(lessons, Loss::Squared, &growth, false)
    }

    fn plant(lessons: &Lessons<'_>, loss: Loss, growth: &Growth, one_after_the_other: bool) -> Option<Self> {
        let count = lessons.count();
        let usable =
            |i: usize| [lessons.offsets[i], lessons.targets[i], lessons.weights[i]].iter().all(|x| x.is_finite());
        if count < 2 * growth.least_rows.max(1) || lessons.width > usize::from(u16::MAX) || !(0..count).all(usable) {
            return None;
        }
        let bounds: Vec<Vec<f32>> = (0..lessons.width).map(|feature| bounds(lessons, feature, count)).collect();
        let bins = binned(lessons, &bounds, count);
        let mut said: Vec<f32> = lessons.offsets[..count].to_vec();
        let mut corrected = said.clone();
        let mut dice = Dice::new(growth.seed);
        let width = 1 << growth.depth.clamp(1, DEEPEST);
        let (mut splits, mut leaves) = (Vec::new(), Vec::new());
        let mut field = Field { lessons, bounds: &bounds, bins: &bins, loss, growth, slopes: vec![(0.0, 0.0); count] };
        for _ in 0..growth.rounds {
            let rows: Vec<u32> = (0..count as u32).filter(|_| dice.share() < growth.row_share).collect();
            let features: Vec<usize> = (0..lessons.width).filter(|_| dice.share() < growth.feature_share).collect();
            if rows.len() < 2 * growth.least_rows.max(1) || features.is_empty() {
                continue;
            }
            let tree = field.grow(&rows, &features, &said);
            for (row, corrected) in lessons.rows.chunks_exact(lessons.width).zip(&mut corrected) {
                *corrected += tree.leaves[leaf(&tree.splits, row)];
            }
            if one_after_the_other {
                said.copy_from_slice(&corrected);
            }
            splits.extend(tree.splits);
            leaves.extend(tree.leaves);
        }
        let corrections = corrected.iter().zip(lessons.offsets).map(|(corrected, offset)| corrected - offset);
        let reach = corrections.fold([f32::MAX, f32::MIN], |[low, high], x| [low.min(x), high.max(x)]);
        Some(Self { loss, splits, leaves, width, reach })
    }

    /// What it says of a row of features with that offset: a value, a quantile, or log-odds.
    #[must_use]
    pub fn predict(&self, row: &[f32], offset: f32) -> f32 {
        let trees = self
            .splits
            .chunks_exact(self.width.saturating_sub(1).max(1))
            .zip(self.leaves.chunks_exact(self.width.max(1)));
        let correction: f32 = trees.filter_map(|(splits, leaves)| leaves.get(leaf(splits, row))).sum();
        // Not `clamp`: a state that was stored badly must not panic.
        offset + correction.max(self.reach[0]).min(self.reach[1])
    }

    /// What it was made small for.
    #[must_use]
    pub fn loss(&self) -> Loss {
        self.loss
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        size_of::<Self>() + size_of_val(self.splits.as_slice()) + size_of_val(self.leaves.as_slice())
    }
}

/// Upper bounds of a feature's bins but the last: its quantiles, each once.
fn bounds(lessons: &Lessons<'_>, feature: usize, count: usize) -> Vec<f32> {
    let every = count.div_ceil(SURVEY);
    let mut values: Vec<f32> =
        (0..count).step_by(every).map(|row| lessons.rows[row * lessons.width + feature]).collect();
    values.sort_by(f32::total_cmp);
    let mut bounds: Vec<f32> = (1..BINS).map(|bin| values[(bin * values.len() / BINS).min(values.len() - 1)]).collect();
    bounds.dedup();
    bounds
}

/// The bin of each value, feature by feature.
fn binned(lessons: &Lessons<'_>, bounds: &[Vec<f32>], count: usize) -> Vec<Vec<u8>> {
    let column = |(feature, bounds): (usize, &Vec<f32>)| -> Vec<u8> {
        let value = |row: usize| lessons.rows[row * lessons.width + feature];
        (0..count).map(|row| bounds.partition_point(|bound| *bound < value(row)) as u8).collect()
    };
    bounds.iter().enumerate().map(column).collect()
}

/// All that growing one tree looks at.
struct Field<'a> {
    lessons: &'a Lessons<'a>,
    bounds: &'a [Vec<f32>],
    bins: &'a [Vec<u8>],
    loss: Loss,
    growth: &'a Growth,
    /// First and second derivative of each row's loss.
    slopes: Vec<(f32, f32)>,
}

/// Sums over the rows of a bin: first derivatives, second derivatives, rows.
type Sums = [f32; 3];

fn plus(a: Sums, b: Sums) -> Sums {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2]]
}

impl Field<'_> {
    fn grow(&mut self, rows: &[u32], features: &[usize], said: &[f32]) -> Tree {
        let depth = self.growth.depth.clamp(1, DEEPEST);
        for row in rows {
            let row = *row as usize;
            let (first, second) = slope(self.loss, said[row], self.lessons.targets[row]);
            let weight = self.lessons.weights[row];
            self.slopes[row] = (first * weight, second * weight);
        }
        // Rows of each node of this level, left to right.
        let mut nodes: Vec<Vec<u32>> = vec![rows.to_vec()];
        let mut splits = Vec::with_capacity((1 << depth) - 1);
        for _ in 0..depth {
            let mut below = Vec::with_capacity(2 * nodes.len());
            for rows in nodes {
                let split = self.best(&rows, features);
                let Some((feature, bin)) = split else {
                    splits.push(Split { feature: 0, bound: f32::MAX });
                    below.extend([rows, Vec::new()]);
                    continue;
                };
                splits.push(Split { feature: feature as u16, bound: self.bounds[feature][usize::from(bin)] });
                let (left, right) = rows.into_iter().partition(|row| self.bins[feature][*row as usize] <= bin);
                below.extend([left, right]);
            }
            nodes = below;
        }
        Tree { splits, leaves: nodes.iter().map(|rows| self.leaf(rows, said)).collect() }
    }

    /// The split that gains most, as a feature and the last bin that goes left.
    fn best(&self, rows: &[u32], features: &[usize]) -> Option<(usize, u8)> {
        let least = self.growth.least_rows.max(1) as f32;
        if (rows.len() as f32) < 2.0 * least {
            return None;
        }
        let worth = |[first, second, _]: Sums| first * first / (second + self.growth.penalty.max(1e-6));
        let mut best = (0.0, None);
        for feature in features {
            let column = &self.bins[*feature];
            let mut histogram = [[0.0_f32; 3]; BINS];
            for row in rows {
                let (first, second) = self.slopes[*row as usize];
                let bin = &mut histogram[usize::from(column[*row as usize]) % BINS];
                *bin = plus(*bin, [first, second, 1.0]);
            }
            let all = histogram.iter().fold([0.0; 3], |all, bin| plus(all, *bin));
            let mut left = [0.0; 3];
            for (bin, sums) in histogram.iter().enumerate().take(self.bounds[*feature].len()) {
                left = plus(left, *sums);
                let right = [all[0] - left[0], all[1] - left[1], all[2] - left[2]];
                if left[2] < least || right[2] < least {
                    continue;
                }
                let gain = worth(left) + worth(right) - worth(all);
                if gain > best.0 {
                    best = (gain, Some((*feature, bin as u8)));
                }
            }
        }
        best.1
    }

    /// What a leaf adds.
    fn leaf(&self, rows: &[u32], said: &[f32]) -> f32 {
        if rows.is_empty() {
            return 0.0;
        }
        let rate = self.growth.rate;
        match self.loss {
            Loss::Pinball(level) => {
                let left = |row: usize| (self.lessons.targets[row] - said[row], self.lessons.weights[row]);
                let mut left: Vec<(f32, f32)> = rows.iter().map(|row| left(*row as usize)).collect();
                left.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
                let count: f32 = left.iter().map(|(_, weight)| weight).sum();
                let (mut below, until) = (0.0, count * level.clamp(0.0, 1.0) as f32);
                let reached = left.iter().find(|(_, weight)| {
                    below += weight;
                    below >= until
                });
                rate * reached.or(left.last()).map_or(0.0, |(value, _)| *value) * count / (count + self.growth.penalty)
            }
            Loss::Squared | Loss::Logistic => {
                let sum = rows.iter().fold((0.0, 0.0), |sum: (f32, f32), row| {
                    let slope = self.slopes[*row as usize];
                    (sum.0 + slope.0, sum.1 + slope.1)
                });
                -rate * sum.0 / (sum.1 + self.growth.penalty)
            }
        }
    }
}

fn slope(loss: Loss, said: f32, target: f32) -> (f32, f32) {
    match loss {
        Loss::Squared => (said - target, 1.0),
        Loss::Pinball(level) => (if target > said { -level as f32 } else { 1.0 - level as f32 }, 1.0),
        Loss::Logistic => {
            let p = 1.0 / (1.0 + (-said).exp());
            (p - target, (p * (1.0 - p)).max(1e-4))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of three features in 0..1, the last of no use.
    fn rows(count: usize) -> Vec<f32> {
        let mut dice = Dice::new(5);
        (0..3 * count).map(|_| dice.share()).collect()
    }

    #[test]
    fn an_interaction_is_learned_that_no_line_can_follow() {
        let rows = rows(6_000);
        let truth = |row: &[f32]| if (row[0] > 0.5) == (row[1] > 0.3) { 4.0 } else { -1.0 };
        let mut dice = Dice::new(6);
        let targets: Vec<f32> = rows.chunks(3).map(|row| truth(row) + dice.share() - 0.5).collect();
        let offsets = vec![0.0; targets.len()];
        let weights = vec![1.0; targets.len()];
        let lessons = Lessons { rows: &rows, width: 3, offsets: &offsets, targets: &targets, weights: &weights };
        let growth = Growth { feature_share: 1.0, ..Growth::default() };
        let model = Boosted::fit(&lessons, Loss::Squared, &growth).expect("enough rows");
        assert_eq!(
            Some(&model),
            Boosted::fit(&lessons, Loss::Squared, &growth).as_ref(),
            "the same seed, the same trees"
        );
        let error = |model: &dyn Fn(&[f32]) -> f32| {
            rows.chunks(3).map(|row| (model(row) - truth(row)).abs()).sum::<f32>() / targets.len() as f32
        };
        assert!(error(&|row| model.predict(row, 0.0)) < 0.15 * error(&|_| 1.5));
        // Far outside of what was seen nothing grows.
        assert!((-2.0..=5.0).contains(&model.predict(&[1e30, -1e30, 0.0], 0.0)));
    }

    #[test]
    fn a_quantile_follows_the_spread() {
        let rows = rows(8_000);
        let mut dice = Dice::new(7);
        let targets: Vec<f32> =
            rows.chunks(3).map(|row| (if row[0] > 0.5 { 10.0 } else { 1.0 }) * dice.share()).collect();
        let offsets = vec![0.5; targets.len()];
        let weights = vec![1.0; targets.len()];
        let lessons = Lessons { rows: &rows, width: 3, offsets: &offsets, targets: &targets, weights: &weights };
        let growth = Growth { penalty: 1.0, feature_share: 1.0, ..Growth::default() };
        let model = Boosted::fit(&lessons, Loss::Pinball(0.9), &growth).expect("enough rows");
        let (wide, narrow) = (model.predict(&[0.8, 0.5, 0.5], 0.5), model.predict(&[0.2, 0.5, 0.5], 0.5));
        assert!((wide - 9.0).abs() < 0.7 && (narrow - 0.9).abs() < 0.3, "{wide} {narrow}");
    }

    #[test]
    fn log_odds_correct_the_offset_and_not_more() {
        let rows = rows(8_000);
        let mut dice = Dice::new(8);
        // The offset says 0.5; the truth is 0.2 and 0.6.
        let chance = |row: &[f32]| if row[1] > 0.5 { 0.6 } else { 0.2 };
        let targets: Vec<f32> = rows.chunks(3).map(|row| if dice.share() < chance(row) { 1.0 } else { 0.0 }).collect();
        let offsets = vec![0.0; targets.len()];
        let weights = vec![1.0; targets.len()];
        let lessons = Lessons { rows: &rows, width: 3, offsets: &offsets, targets: &targets, weights: &weights };
        let model = Boosted::fit(&lessons, Loss::Logistic, &Growth::default()).expect("enough rows");
        let p = |row: &[f32]| 1.0 / (1.0 + (-model.predict(row, 0.0)).exp());
        assert!((p(&[0.5, 0.9, 0.5]) - 0.6).abs() < 0.1 && (p(&[0.5, 0.1, 0.5]) - 0.2).abs() < 0.1);
    }

    #[test]
    fn too_little_and_nonsense_are_refused() {
        let fit = |rows: &[f32], width, targets: &[f32]| {
            let offsets = vec![0.0; targets.len()];
            let weights = vec![1.0; targets.len()];
            Boosted::fit(
                &Lessons { rows, width, offsets: &offsets, targets, weights: &weights },
                Loss::Squared,
                &Growth::default(),
            )
        };
        assert!(fit(&[1.0; 30], 1, &[1.0; 30]).is_none());
        assert!(fit(&[], 0, &[1.0; 300]).is_none());
        let mut targets = [1.0; 300];
        assert!(fit(&[1.0; 300], 1, &targets).is_some_and(|model| (model.predict(&[1.0], 0.0) - 1.0).abs() < 0.1));
        targets[7] = f32::NAN;
        assert!(fit(&[1.0; 300], 1, &targets).is_none());
    }
}
