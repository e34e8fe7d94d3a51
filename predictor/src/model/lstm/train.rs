//! The fit, by candle: gradients through time over windows, Adam (Kingma and Ba, *Adam: a method for stochastic optimization*, 2015), and
//! the weights of that round which did best on the newest windows, which are not learned from (Prechelt, *Early stopping - but when?*,
//! 1998).
//!
//! One thread and a fixed order of everything: candle's matrices are far below the size from which it shares work among threads.

use candle_core::{Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, ops::sigmoid};

use super::{EPOCHS, Fitted, GATES, HIDDEN, LESSONS, Lstm, Measures, WINDOW, Weights};

/// Windows that are learned from together.
const BATCH: usize = 32;
/// The newest of so many windows is kept for judging rounds.
const JUDGED: usize = 6;
/// Size of steps at first and at last.
const RATES: [f64; 2] = [0.03, 0.003];
/// After so many rounds that were no better it is over.
const PATIENCE: usize = 6;
/// A change further than so many of its usual size teaches no more than that.
const FURTHEST: f32 = 20.0;

/// Windows of equal length: for each of their samples the features of all windows, and what came.
struct Batch {
    inputs: Vec<Tensor>,
    targets: Tensor,
    count: usize,
}

/// A generator of our own (splitmix64, Steele, Lea and Flood 2014): no randomness from outside.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Between -1 and 1.
    fn weight(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    /// In another order (Fisher and Yates).
    fn shuffle<T>(&mut self, all: &mut [T]) {
        for last in (1..all.len()).rev() {
            all.swap(last, (self.next() % (last as u64 + 1)) as usize);
        }
    }
}

/// Weights for `values`, whose first stands at step `first`; `None` if they do not move, or if nothing sound comes of it.
pub(super) fn fitted(model: &Lstm, values: &[f32], first: u64) -> Option<Fitted> {
    let measures = measures(model, values)?;
    let weights = learn(model, &measures, values, first).ok().flatten()?;
    Some(Fitted { measures, weights })
}

fn measures(model: &Lstm, values: &[f32]) -> Option<Measures> {
    let change = |steps: usize| {
        let pairs = values.len() - steps;
        values.iter().zip(&values[steps..]).map(|(a, b)| f64::from(b - a).abs()).sum::<f64>() / pairs as f64
    };
    let count = values.len() as f64;
    let centre = values.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
    let spread = values.iter().map(|value| (f64::from(*value) - centre).abs()).sum::<f64>() / count;
    let [centre, spread, step] = [centre, spread, change(1)].map(|size| size as f32);
    let changes: Vec<f32> = model.horizons.iter().map(|steps| change(*steps) as f32).collect();
    let sound = [spread, step].iter().chain(&changes).all(|size| size.is_finite() && *size > 0.0);
    sound.then_some(Measures { centre, spread, step, changes })
}

/// Windows that end at these places of `values`, as tensors.
fn batch(model: &Lstm, measures: &Measures, values: &[f32], first: u64, ends: &[usize]) -> Result<Batch> {
    let (count, width) = (ends.len(), model.width());
    let told = |age: usize| {
        let mut rows = Vec::with_capacity(count * width);
        for end in ends {
            let at = end - age;
            model.tell(measures, values[at - 1], values[at], first + at as u64, &mut rows);
        }
        Tensor::from_vec(rows, (count, width), &Device::Cpu)
    };
    let inputs = (0..WINDOW).rev().map(told).collect::<Result<Vec<_>>>()?;
    let mut targets = Vec::with_capacity(count * model.horizons.len());
    for end in ends {
        for (steps, usual) in model.horizons.iter().zip(&measures.changes) {
            targets.push(((values[end + steps] - values[*end]) / usual).clamp(-FURTHEST, FURTHEST));
        }
    }
    let targets = Tensor::from_vec(targets, (count, model.horizons.len()), &Device::Cpu)?;
    Ok(Batch { inputs, targets, count })
}

/// The same as [`Lstm::answers`] for many windows, such that candle can tell the gradients.
fn forward(batch: &Batch, gates: &Tensor, answers: &Tensor) -> Result<Tensor> {
    let mut said = Tensor::zeros((batch.count, HIDDEN), candle_core::DType::F32, &Device::Cpu)?;
    let mut cells = said.clone();
    for input in &batch.inputs {
        let all = Tensor::cat(&[input, &said], 1)?.matmul(gates)?;
        let open = sigmoid(&all.narrow(1, 0, (GATES - 1) * HIDDEN)?)?;
        let gate = |number: usize| open.narrow(1, number * HIDDEN, HIDDEN);
        let intake = all.narrow(1, (GATES - 1) * HIDDEN, HIDDEN)?.tanh()?;
        cells = ((gate(1)? * &cells)? + (gate(0)? * intake)?)?;
        said = (gate(2)? * cells.tanh()?)?;
    }
    let one = Tensor::ones((batch.count, 1), candle_core::DType::F32, &Device::Cpu)?;
    Tensor::cat(&[&said, &one], 1)?.matmul(answers)
}

/// Squares of small errors and the size of large ones: one jump does not rule the fit.
fn loss(batch: &Batch, gates: &Tensor, answers: &Tensor) -> Result<Tensor> {
    let off = (forward(batch, gates, answers)? - &batch.targets)?;
    ((off.sqr()? + 1.0)?.sqrt()? - 1.0)?.mean_all()
}

/// Weights before the first lesson: cells remember at first, and nothing is said.
fn start(model: &Lstm, draw: &mut Draw) -> Result<[Var; 2]> {
    let (rows, columns) = (model.width() + HIDDEN, GATES * HIDDEN);
    let reach = 1.0 / (HIDDEN as f32).sqrt();
    let mut gates: Vec<f32> = (0..rows * columns).map(|_| reach * draw.weight()).collect();
    // The row of the feature that is always 1.
    let constant = (model.width() - 1) * columns;
    gates[constant..constant + columns].fill(0.0);
    gates[constant + HIDDEN..constant + 2 * HIDDEN].fill(1.0);
    let answers = vec![0.0_f32; (HIDDEN + 1) * model.horizons.len()];
    Ok([
        Var::from_vec(gates, (rows, columns), &Device::Cpu)?,
        Var::from_vec(answers, (HIDDEN + 1, model.horizons.len()), &Device::Cpu)?,
    ])
}

fn learn(model: &Lstm, measures: &Measures, values: &[f32], first: u64) -> Result<Option<Weights>> {
    let mut draw = Draw(model.seed);
    let longest = model.horizons.iter().copied().max().unwrap_or(1);
    let ends: Vec<usize> = (WINDOW..values.len() - longest).collect();
    let every = ends.len().div_ceil(LESSONS);
    let mut ends: Vec<usize> = ends.into_iter().rev().step_by(every).collect();
    let mut lessons = ends.split_off((ends.len() / JUDGED).max(1));
    draw.shuffle(&mut lessons);
    let batches = |ends: &[usize]| {
        ends.chunks(BATCH).map(|ends| batch(model, measures, values, first, ends)).collect::<Result<Vec<_>>>()
    };
    let (mut lessons, judged) = (batches(&lessons)?, batches(&ends)?);
    let [gates, answers] = start(model, &mut draw)?;
    let adam = ParamsAdamW { lr: RATES[0], weight_decay: 0.0, ..ParamsAdamW::default() };
    let mut adam = AdamW::new(vec![gates.clone(), answers.clone()], adam)?;
    let (mut best, mut last): (Option<(f32, Weights)>, usize) = (None, 0);
    for epoch in 0..EPOCHS {
        let part = epoch as f64 / (EPOCHS - 1).max(1) as f64;
        adam.set_learning_rate(RATES[0] * (RATES[1] / RATES[0]).powf(part));
        draw.shuffle(&mut lessons);
        for batch in &lessons {
            adam.backward_step(&loss(batch, &gates, &answers)?)?;
        }
        let mut lost = 0.0;
        for batch in &judged {
            // Detached: no gradients are wanted of it.
            lost += loss(batch, &gates.detach(), &answers.detach())?.to_scalar::<f32>()? * batch.count as f32;
        }
        if lost.is_finite() && best.as_ref().is_none_or(|(least, _)| lost < *least) {
            last = epoch;
            let flat = |var: &Var| var.flatten_all()?.to_vec1::<f32>();
            best = Some((lost, Weights { gates: flat(&gates)?, answers: flat(&answers)? }));
        } else if epoch >= last + PATIENCE {
            break;
        }
    }
    Ok(best.map(|(_, weights)| weights))
}

#[cfg(test)]
mod tests {
    use super::super::super::arima::Arima;
    use super::super::super::fit::test::{error_over_naive, noise};
    use super::super::super::fit::{Dear, History};
    use super::super::super::{Budget, Model};
    use super::*;

    /// A level that flips six steps after a small spike, whichever of the two it has: spikes are rare and come at any time.
    fn flips(steps: usize) -> Vec<Option<f64>> {
        let (mut state, mut level, mut due, mut quiet) = (23, 50.0, None, 0);
        (0..steps)
            .map(|t| {
                quiet += 1;
                if due == Some(t) {
                    level = if level > 55.0 { 50.0 } else { 60.0 };
                }
                let marked = quiet > 10 && noise(&mut state) > 0.7;
                if marked {
                    (due, quiet) = (Some(t + 6), 0);
                }
                Some(level + if marked { 2.0 } else { 0.0 } + 0.1 * noise(&mut state))
            })
            .collect()
    }

    #[test]
    fn a_marker_some_steps_ago_is_remembered_which_no_line_can_use() {
        let series = flips(3_000);
        let linear = error_over_naive(Arima::default(), &series, 2_400, 1);
        let error = error_over_naive(Lstm::new(&[1, 3], &[], 1), &series, 2_400, 1);
        assert!(linear > 0.8, "a line does it too: {linear}");
        // What is left at best is the spike, which nobody can know: 2 of 14.
        assert!(error < 0.45, "{error}");
    }

    #[test]
    fn the_loops_that_forecast_say_what_was_trained() {
        let values = flips(600);
        let mut model = Lstm::new(&[1, 3, 12], &[12], 7);
        assert!(model.fit(&History::new(&values, 5, &[]), &mut Budget::unlimited()));
        let Fitted { measures, weights } = model.fitted.as_ref().expect("fitted");
        let rows = model.rows(measures);
        let tensor = |numbers: &[f32], shape: (usize, usize)| Tensor::from_slice(numbers, shape, &Device::Cpu);
        let width = model.width();
        let inputs = rows.chunks(width).map(|row| tensor(row, (1, width)).expect("a row")).collect();
        let batch = Batch { inputs, targets: tensor(&[0.0; 3], (1, 3)).expect("sound"), count: 1 };
        let gates = tensor(&weights.gates, (width + HIDDEN, GATES * HIDDEN)).expect("sound");
        let answers = tensor(&weights.answers, (HIDDEN + 1, 3)).expect("sound");
        let candle = forward(&batch, &gates, &answers).and_then(|said| said.flatten_all()?.to_vec1::<f32>());
        let candle = candle.expect("sound");
        let own = model.answers(weights, &rows);
        assert!(own.iter().any(|answer| answer.abs() > 1e-3), "it says nothing: {own:?}");
        for (own, candle) in own.iter().zip(&candle) {
            assert!((own - candle).abs() < 1e-4, "{own} {candle}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_bits_and_another_one_others_and_the_state_is_stored() {
        let series = flips(700);
        let fit = |seed: u64, until: usize| {
            let mut model = Lstm::new(&[1, 3], &[288], seed);
            assert!(model.fit(&History::new(&series[..until], 100, &[]), &mut Budget::unlimited()));
            model
        };
        let (mut one, other) = (fit(3, 600), fit(3, 600));
        assert!(one == other, "the same seed, and other weights");
        assert!(one.fitted != fit(4, 600).fitted, "the seed means nothing");
        let stored = serde_json::to_string(&one).expect("can be stored");
        let mut restored: Lstm = serde_json::from_str(&stored).expect("and read");
        assert!(restored == one, "what is read is not what was stored");
        let (mut a, mut b) = ([f32::NAN; 2], [f32::NAN; 2]);
        for value in &series[600..] {
            one.update(*value);
            restored.update(*value);
            one.forecast(&[1, 3], &mut a);
            restored.forecast(&[1, 3], &mut b);
            assert!(a.iter().all(|said| said.is_finite()) && a.map(f32::to_bits) == b.map(f32::to_bits));
        }
        // A refused fit leaves everything as it was.
        let before = one.clone();
        let history = History::new(&series, 100, &[]);
        let mut short = Budget::new(one.work(&history) - 1);
        assert!(!one.fit(&history, &mut short) && one == before && short.left() == one.work(&history) - 1);
    }

    #[test]
    fn what_does_not_move_or_is_absurd_is_refused_or_survived() {
        let still = vec![Some(3.0); 600];
        assert!(!Lstm::new(&[1], &[], 1).fit(&History::new(&still, 0, &[]), &mut Budget::unlimited()));
        let series = flips(600);
        let mut model = Lstm::new(&[1], &[], 1);
        assert!(model.fit(&History::new(&series, 0, &[]), &mut Budget::unlimited()));
        model.update(Some(1e15));
        model.update(None);
        model.update(Some(50.0));
        let mut out = [f32::NAN];
        model.forecast(&[1], &mut out);
        assert!(out[0].is_finite() && out[0].abs() < 1e3, "{out:?}");
    }
}
