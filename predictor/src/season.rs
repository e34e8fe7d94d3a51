//! Cycles of known length, such as an hour or a day: how the series differs at each phase from its recent mean.

use crate::fetch::fetch;
use serde::{Deserialize, Serialize};

/// The mean profile of one cycle, in as many parts as it has steps, or fewer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Season {
    /// Steps of the cycle.
    length: u32,
    /// Deviation in each part, as the upper half of an `f32`: two digits are enough, and every machine has hundreds.
    profile: Box<[u16]>,
    /// Weight of the newest cycle.
    rate: f32,
    /// Sum and number of the deviations in the part that the newest sample lies in. A part learns when it is left: what is said
    /// of its later steps must not know its earlier ones, since a forecast of them from further away does not.
    #[serde(default)]
    open: (f32, u16),
    /// The recent mean that deviations are from: a cycle's memory.
    mean: f32,
    /// Place in the cycle of the step after the newest sample.
    place: u32,
    /// Complete cycles.
    cycles: u32,
    seen: u32,
}

impl Season {
    /// A cycle of `length` steps (at least 2) told apart in `parts` at most, in which the newest cycle weighs `rate`.
    #[must_use]
    pub fn new(length: usize, parts: usize, rate: f64) -> Self {
        let length = length.clamp(2, 1 << 20);
        let profile = vec![0; parts.clamp(1, length)].into();
        Self {
            length: length as u32,
            profile,
            rate: rate as f32,
            open: (0.0, 0),
            mean: 0.0,
            place: 0,
            cycles: 0,
            seen: 0,
        }
    }

    /// How many parts it tells apart.
    #[must_use]
    pub fn parts(&self) -> usize {
        self.profile.len()
    }

    /// The part in which the step `ahead` of the newest sample lies (0 = the newest sample's).
    #[must_use]
    pub fn part(&self, ahead: usize) -> usize {
        let mut place = u64::from(self.place) + u64::from(self.length) - 1 + ahead as u64;
        let length = u64::from(self.length);
        if place >= length {
            place -= length;
            if place >= length {
                place %= length;
            }
        }
        self.part_at(place as u32)
    }

    fn part_at(&self, place: u32) -> usize {
        let parts = self.profile.len() as u32;
        // 2^20 steps by 288 parts stay within 32 bits.
        if parts == self.length { place as usize } else { (place * parts / self.length) as usize }
    }

    /// Takes the next sample.
    pub fn update(&mut self, value: Option<f64>) {
        if let Some(value) = value {
            let value = value as f32;
            let length = self.length as f32;
            self.seen = self.seen.saturating_add(1);
            self.mean += (value - self.mean) * (1.0 / self.seen as f32).max(2.0 / (length + 1.0));
            self.open = (self.open.0 + value - self.mean, self.open.1.saturating_add(1));
        }
        let part = self.part_at(self.place);
        self.place += 1;
        if self.place == self.length || self.part_at(self.place) != part {
            self.close(part);
        }
        if self.place == self.length {
            self.place = 0;
            self.cycles = self.cycles.saturating_add(1);
        }
    }

    /// A part learns from its visit; as much less as samples were missing.
    fn close(&mut self, part: usize) {
        let (sum, count) = std::mem::take(&mut self.open);
        if count > 0 {
            let share = (f32::from(count) * self.profile.len() as f32 / self.length as f32).min(1.0);
            let rate = self.rate.max(1.0 / (self.cycles as f32 + 2.0)) * share;
            let deviation = whole(self.profile[part]);
            self.profile[part] = half(deviation + (sum / f32::from(count) - deviation) * rate);
        }
    }

    /// Asks for what [`Season::deviation`] reads; see [`crate::bank::Bank::fetch`].
    pub(crate) fn fetch(&self, ahead: usize) {
        fetch(&self.profile[self.part(ahead)]);
    }

    /// The deviation `ahead` steps after the newest sample (0 = at it); 0 before the first cycle is complete.
    #[must_use]
    pub fn deviation(&self, ahead: usize) -> f32 {
        if self.cycles == 0 { 0.0 } else { whole(self.profile[self.part(ahead)]) }
    }
}

/// The upper half of a finite number, rounded to nearest.
pub(crate) fn half(value: f32) -> u16 {
    (value.to_bits().saturating_add(0x8000) >> 16) as u16
}

pub(crate) fn whole(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_keep_two_digits() {
        for value in [0.0, 1.0, -3.75, 1234.5, -1e12, 3e-7] {
            assert!((whole(half(value)) - value).abs() <= 0.004 * value.abs(), "{value}");
        }
    }

    #[test]
    fn a_part_does_not_know_its_own_visit_before_it_is_over() {
        let mut season = Season::new(40, 4, 0.1);
        for t in 0..200 {
            season.update(Some(if t % 40 < 10 { 9.0 } else { 1.0 }));
        }
        let before = season.deviation(1);
        // Half of the first part, far from what it was: at its sixth step the profile still says what it said before its first.
        (0..5).for_each(|_| season.update(Some(500.0)));
        assert_eq!(season.deviation(1), before);
        (0..5).for_each(|_| season.update(Some(500.0)));
        assert!(season.deviation(0) > before + 10.0, "and then it knows: {}", season.deviation(0));
    }

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
