//! The normal equations of one horizon: sums that decay, and the weights that solve them.

use super::P;
use serde::{Deserialize, Serialize};

/// Entries of the upper triangle of the normal matrix.
const TRIANGLE: usize = P * (P + 1) / 2;

/// Sums for one horizon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Equations {
    /// Upper triangle of the sum of x x', row by row.
    #[serde(with = "crate::window::array")]
    matrix: [f32; TRIANGLE],
    /// Sum of x y.
    pub(super) right: [f32; P],
    pub(super) steps: u32,
    /// What is left of an outcome's weight when the next is learned from.
    decay: f32,
    /// Outcomes learned from so far.
    pub(super) seen: u32,
    /// The step up to which it has learned, and the one at which it has to learn again.
    pub(super) learned: u32,
    pub(super) due: u32,
}

/// Outcomes of neighbouring origins overlap and tell almost the same: of horizons beyond the first steps, three of seven are
/// learned from. Seven divides no minute, hour or day, so that no phase of a cycle is left out.
pub(super) const PATTERN: u32 = 7;
const LEARNED: [bool; PATTERN as usize] = [true, false, true, false, true, false, false];
pub(super) const SHARE: f64 = 3.0 / 7.0;
/// Horizons of fewer steps are learned from always.
const DENSE: u32 = 3;

/// The further ahead, the more alike are neighbouring outcomes and the longer they have to be remembered. `decay` is a step's for
/// the first horizon.
fn remaining(steps: usize, decay: f64) -> f32 {
    let every = if steps as u64 >= u64::from(DENSE) { 1.0 / SHARE } else { 1.0 };
    decay.powf(every / (1.0 + (steps as f64).ln() / 3.0)) as f32
}

pub(super) fn dot(a: &[f32; P], b: &[f32; P]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Learns one row of the triangle, which has `N` entries; what comes after it is returned.
#[inline(always)]
fn row<'a, const N: usize>(triangle: &'a mut [f32], x: &[f32; P], weighted: &[f32; P], decay: f32) -> &'a mut [f32] {
    let (Some((row, below)), Some(x)) = (triangle.split_first_chunk_mut::<N>(), x.last_chunk::<N>()) else {
        return &mut [];
    };
    let weighted = weighted[P - N];
    for (entry, x) in row.iter_mut().zip(x) {
        *entry = *entry * decay + weighted * x;
    }
    below
}

impl Equations {
    /// For the horizon of so many steps, forgetting by `decay` a step at the first horizon.
    pub(super) fn new(steps: usize, decay: f64) -> Self {
        Self {
            matrix: [0.0; TRIANGLE],
            right: [0.0; P],
            steps: u32::try_from(steps).unwrap_or(u32::MAX),
            decay: remaining(steps, decay),
            seen: 0,
            learned: 0,
            due: 1,
        }
    }

    pub(super) fn is_sparse(&self) -> bool {
        self.steps >= DENSE
    }

    /// Whether those of this number learn at this step: not all horizons at the same one.
    pub(super) fn learns(&self, clock: u32, index: usize) -> bool {
        !self.is_sparse() || LEARNED[(clock.wrapping_add(index as u32) % PATTERN) as usize]
    }

    /// Learns that `y` came of features `x`, of which `weights` would have said otherwise.
    pub(super) fn learn(&mut self, x: &[f32; P], y: f32, weights: &[f32; P]) {
        let decay = self.decay;
        let error = (y - dot(weights, x)).abs();
        let weight = 1.0 / error.max(1.0);
        let weighted = x.map(|x| weight * x);
        for (right, weighted) in self.right.iter_mut().zip(weighted) {
            *right = *right * decay + weighted * y;
        }
        // Rows of a length that the compiler knows become vector instructions.
        let rest = self.matrix.as_mut_slice();
        let rest = row::<10>(rest, x, &weighted, decay);
        let rest = row::<9>(rest, x, &weighted, decay);
        let rest = row::<8>(rest, x, &weighted, decay);
        let rest = row::<7>(rest, x, &weighted, decay);
        let rest = row::<6>(rest, x, &weighted, decay);
        let rest = row::<5>(rest, x, &weighted, decay);
        let rest = row::<4>(rest, x, &weighted, decay);
        let rest = row::<3>(rest, x, &weighted, decay);
        let rest = row::<2>(rest, x, &weighted, decay);
        row::<1>(rest, x, &weighted, decay);
        self.seen = self.seen.saturating_add(1);
    }

    /// Solves (X'X + penalty I) w = X'y, if that is possible.
    pub(super) fn solution(&self, penalty: f64) -> Option<[f32; P]> {
        let mut matrix = [[0.0; P]; P];
        let mut entries = self.matrix.iter();
        for i in 0..P {
            for (row, entry) in matrix[i..].iter_mut().zip(entries.by_ref()) {
                row[i] = f64::from(*entry);
            }
            matrix[i][i] = matrix[i][i] * 1.001 + penalty;
        }
        let weights = solved(matrix, self.right.map(f64::from))?.map(|weight| weight as f32);
        weights.iter().all(|weight| weight.is_finite()).then_some(weights)
    }
}

/// Solves A x = b for a symmetric A, of which the lower triangle is given, by Cholesky's decomposition (Golub and Van Loan, *Matrix
/// Computations*, 4.2): row by row into L, then forwards with L and backwards with its transpose. `None` if A is not positive
/// definite. In arrays of fixed length, since ten thousand machines solve hundreds of these at each step.
fn solved(mut a: [[f64; P]; P], mut b: [f64; P]) -> Option<[f64; P]> {
    for j in 0..P {
        let mut squares = 0.0;
        for k in 0..j {
            let product: f64 = a[k][..k].iter().zip(&a[j][..k]).fold(0.0, |sum, (x, y)| sum + x * y);
            let entry = (a[j][k] - product) / a[k][k];
            a[j][k] = entry;
            squares += entry * entry;
        }
        let rest = a[j][j] - squares;
        // At 0 the matrix is singular, and the divisions below would be by 0.
        if rest <= 0.0 || rest.is_nan() {
            return None;
        }
        a[j][j] = rest.sqrt();
    }
    for k in 0..P {
        for i in 0..k {
            b[k] -= b[i] * a[k][i];
        }
        b[k] /= a[k][k];
    }
    for k in (0..P).rev() {
        for i in k + 1..P {
            b[k] -= b[i] * a[i][k];
        }
        b[k] /= a[k][k];
    }
    Some(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_known_length_learn_as_a_loop_does() {
        let mut equations = Equations::new(1, 0.9);
        let (mut matrix, mut right) = ([[0.0_f32; P]; P], [0.0_f32; P]);
        for t in 0..20_u16 {
            let x: [f32; P] = std::array::from_fn(|i| (f32::from(t) * 1.7 + i as f32 * 0.31).sin());
            let y = f32::from(t % 3) / 3.0;
            // No error reaches 1, so that all weigh the same.
            for i in 0..P {
                for j in i..P {
                    matrix[i][j] = matrix[i][j] * equations.decay + x[i] * x[j];
                }
                right[i] = right[i] * equations.decay + x[i] * y;
            }
            equations.learn(&x, y, &[0.0; P]);
        }
        let expected: Vec<f32> = (0..P).flat_map(|i| matrix[i][i..].to_vec()).collect();
        assert_eq!((equations.matrix.to_vec(), equations.right), (expected, right));
    }

    #[test]
    fn equations_are_solved_and_those_that_have_no_solution_are_not() {
        let mut state = 5_u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1_u32 << 24) - 0.5
        };
        // X'X of twenty random rows is positive definite.
        let rows: [[f64; P]; 20] = std::array::from_fn(|_| std::array::from_fn(|_| noise()));
        let a: [[f64; P]; P] =
            std::array::from_fn(|i| std::array::from_fn(|j| rows.iter().map(|row| row[i] * row[j]).sum()));
        let x: [f64; P] = std::array::from_fn(|i| i as f64 - 3.0);
        let b = a.map(|row| row.iter().zip(x).map(|(a, x)| a * x).sum());
        let found = solved(a, b).expect("positive definite");
        assert!(found.iter().zip(x).all(|(found, x)| (found - x).abs() < 1e-8), "{found:?}");
        let mut indefinite = a;
        indefinite[P - 1][P - 1] = -1.0;
        assert_eq!(solved(indefinite, b), None);
        assert_eq!(solved([[f64::NAN; P]; P], b), None);
        // Singular: nothing was seen, all features always the same, and one of them always 0.
        assert_eq!(solved([[0.0; P]; P], [0.0; P]), None);
        assert_eq!(solved([[4.0; P]; P], [4.0; P]), None);
        for feature in 0..P {
            let mut without = a;
            without[feature] = [0.0; P];
            without.iter_mut().for_each(|row| row[feature] = 0.0);
            assert_eq!(solved(without, b), None, "feature {feature}");
        }
    }

    #[test]
    fn a_penalty_makes_constant_features_solvable_and_without_one_nothing_is_said() {
        let mut equations = Equations::new(1, 0.99);
        for _ in 0..50 {
            equations.learn(&[1.0; P], 2.0, &[0.0; P]);
        }
        let weights = equations.solution(3.0).expect("positive definite");
        assert!((dot(&weights, &[1.0; P]) - 2.0).abs() < 0.1, "{weights:?}");
        let nothing = Equations::new(1, 0.99);
        assert_eq!(nothing.solution(0.0), None);
        assert_eq!(nothing.solution(3.0), Some([0.0; P]));
    }
}
