//! Cycles of known length, such as an hour or a day: how the series differs at each phase from its recent mean.

use serde::{Deserialize, Serialize};

/// The mean profile of one cycle, in as many parts as it has steps, or fewer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Season {
    /// Steps of the cycle.
    length: u64,
    /// Deviation in each part.
    profile: Vec<f32>,
    /// Weight of the newest cycle.
    rate: f32,
    /// The recent mean that deviations are from: a cycle's memory.
    mean: f32,
    clock: u64,
    seen: u32,
}

impl Season {
    /// A cycle of `length` steps (at least 2) told apart in `parts` at most, in which the newest cycle weighs `rate`.
    #[must_use]
    pub fn new(length: usize, parts: usize, rate: f64) -> Self {
        let length = length.max(2);
        let profile = vec![0.0; parts.clamp(1, length)];
        Self { length: length as u64, profile, rate: rate as f32, mean: 0.0, clock: 0, seen: 0 }
    }

    /// How many parts it tells apart.
    #[must_use]
    pub fn parts(&self) -> usize {
        self.profile.len()
    }

    /// The part in which the step `ahead` of the newest sample lies (0 = the newest sample's).
    #[must_use]
    pub fn part(&self, ahead: usize) -> usize {
        // The clock stands at the step after the newest sample.
        self.part_at(self.clock + self.length - 1 + ahead as u64)
    }

    fn part_at(&self, clock: u64) -> usize {
        ((clock % self.length) * self.profile.len() as u64 / self.length) as usize
    }

    /// Takes the next sample.
    pub fn update(&mut self, value: Option<f64>) {
        if let Some(value) = value {
            let value = value as f32;
            let length = self.length as f32;
            self.seen = self.seen.saturating_add(1);
            self.mean += (value - self.mean) * (1.0 / self.seen as f32).max(2.0 / (length + 1.0));
            let cycles = 1.0 + self.clock as f32 / length;
            let steps_a_part = length / self.profile.len() as f32;
            let rate = self.rate.max(1.0 / (cycles + 1.0)) / steps_a_part;
            let part = self.part_at(self.clock);
            let deviation = &mut self.profile[part];
            *deviation += (value - self.mean - *deviation) * rate;
        }
        self.clock += 1;
    }

    /// The deviation `ahead` steps after the newest sample (0 = at it); 0 before the first cycle is complete.
    #[must_use]
    pub fn deviation(&self, ahead: usize) -> f32 {
        if self.clock < self.length { 0.0 } else { self.profile[self.part(ahead)] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_square_wave_is_learned_phase_by_phase() {
        let mut season = Season::new(4, 12, 0.1);
        for t in 0..400 {
            season.update((t % 5 != 0).then_some(if t % 4 == 3 { 8.0 } else { 0.0 }));
        }
        // The newest sample is at t = 399, phase 3.
        let [now, next, last] = [season.deviation(0), season.deviation(1), season.deviation(4)];
        let few = Season::new(12, 3, 0.1);
        assert_eq!((few.parts(), few.part(1), few.part(5), few.part(12)), (3, 0, 1, 2));
        assert!(now > 4.0 && (now - last).abs() < 1e-6 && next < 0.0, "{now} {next} {last}");
    }
}
