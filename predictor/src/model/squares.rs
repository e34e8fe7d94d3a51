//! Least squares.

use smartcore::linalg::basic::arrays::{Array, Array2, MutArray};
use smartcore::linalg::basic::matrix::DenseMatrix;
use smartcore::linalg::traits::cholesky::CholeskyDecomposable;

/// Least squares with a small penalty; returns weights and the sum of squares that is left. Rows are walked twice.
pub(crate) fn least_squares<R>(
    rows: impl Iterator<Item = (R, f64)> + Clone,
    width: usize,
    penalty: f64,
) -> Option<(Vec<f64>, f64)>
where
    R: Iterator<Item = f64>,
{
    let mut matrix = DenseMatrix::<f64>::zeros(width, width);
    let mut right = DenseMatrix::<f64>::zeros(width, 1);
    let mut row = vec![0.0; width];
    let (mut sums, mut products) = (vec![0.0; width * width], vec![0.0; width]);
    for (features, target) in rows.clone() {
        row.iter_mut().zip(features).for_each(|(place, feature)| *place = feature);
        for i in 0..width {
            products[i] += row[i] * target;
            for j in i..width {
                sums[i * width + j] += row[i] * row[j];
            }
        }
    }
    for i in 0..width {
        right.set((i, 0), products[i]);
        for j in i..width {
            let entry = sums[i * width + j];
            matrix.set((i, j), if i == j { entry * (1.0 + penalty) + 1e-9 } else { entry });
            matrix.set((j, i), if i == j { entry * (1.0 + penalty) + 1e-9 } else { entry });
        }
    }
    let solved = matrix.cholesky_solve_mut(right).ok()?;
    let weights: Vec<f64> = (0..width).map(|i| *solved.get((i, 0))).collect();
    let left = rows.map(|(row, target)| (target - row.zip(&weights).map(|(x, w)| x * w).sum::<f64>()).powi(2)).sum();
    weights.iter().all(|weight| weight.is_finite()).then_some((weights, left))
}
