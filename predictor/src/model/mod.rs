//! Point forecasters. Each is cheap enough to run for every machine and resource at every sample.
//!
//! A model only ever sees plausible values (see [`crate::sample::plausible`]); the [`crate::bank::Bank`] bounds what it says.

pub mod ewma;
pub mod holt;
pub mod naive;
pub mod ridge;

/// What one forecaster does.
pub trait Model {
    /// Its name in explanations.
    const NAME: &'static str;

    /// Takes the next sample, `None` if it is missing: time passes either way.
    fn update(&mut self, value: Option<f64>);

    /// Forecasts for `horizons` (steps ahead, ascending) into `out`, which is as long. Untouched entries and NaN mean that the
    /// model has nothing to say yet.
    fn forecast(&self, horizons: &[usize], out: &mut [f32]);
}
