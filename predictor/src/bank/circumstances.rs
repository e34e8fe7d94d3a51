//! What may bear on how wrong a bank is: features for the trees over all banks.

use super::{Bank, Predictions};

/// Numbers that [`Bank::circumstances`] gives.
pub(crate) const CIRCUMSTANCES: usize = 30;

impl Bank {
    /// What may bear on how far a value lies from its forecast at the tracked horizon `index`, in usual errors from the point: into
    /// `row`, which has room for [`CIRCUMSTANCES`]; `said` is [`Bank::predictions`]. Returns point and usual error; `None` before there are any.
    pub(crate) fn circumstances(&self, said: &Predictions, index: usize, row: &mut [f32]) -> Option<(f32, f32)> {
        let (last, track) = (self.last? as f32, self.tracks.get(index)?);
        let (point, scale) = (track.point, self.scales()[index]);
        if scale.is_nan() || scale <= 0.0 || row.len() < CIRCUMSTANCES {
            return None;
        }
        let share = 1.0 / scale;
        let far = |value: f32| (value - point) * share;
        let said = said[index];
        let (levels, [now, ahead]) = (self.levels.values(), self.ridge.seasons(self.config.horizons[index]));
        let features =
            [last, said[1], said[2], said[3], said[4], levels[0], levels[1], levels[2], levels[3]].into_iter();
        let features = features.chain(self.told(index)).chain([self.low as f32, self.high as f32]).map(far);
        let features = features.chain(now).chain(ahead).chain(self.ridge.common());
        let features = features.chain([track.conformal.errors[1], self.step, last].map(|size| size * share));
        let naive = track.losses[0].max(f32::MIN_POSITIVE);
        let features = features.chain([track.losses[4] / naive, scale / naive, track.weights[0]]);
        row[..CIRCUMSTANCES].fill(0.0);
        for (place, feature) in row[..CIRCUMSTANCES].iter_mut().zip(features) {
            *place = if feature.is_finite() { feature.clamp(-1e6, 1e6) } else { 0.0 };
        }
        Some((point, scale))
    }
}
