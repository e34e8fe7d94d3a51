//! Quantiles of what was seen, and how wrong a quantile is.

/// Pinball loss of `quantile` at `level`.
#[must_use]
pub fn pinball(level: f64, quantile: f64, outcome: f64) -> f64 {
    let above = outcome - quantile;
    if above >= 0.0 { level * above } else { (level - 1.0) * above }
}

/// The quantile of sorted values by straight lines; `None` if there are none.
#[must_use]
pub fn sorted_quantile(sorted: &[f64], level: f64) -> Option<f64> {
    let place = level.clamp(0.0, 1.0) * sorted.len().checked_sub(1)? as f64;
    let below = place as usize;
    let above = (below + 1).min(sorted.len() - 1);
    Some(sorted[below] + (place - below as f64) * (sorted[above] - sorted[below]))
}
