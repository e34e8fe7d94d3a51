//! The last samples of a series, missing ones included.

use crate::fetch::fetch;
use serde::{Deserialize, Serialize};

/// A bounded history, oldest first. Values are kept as `f32` (seven digits are more than any meter gives); a missing sample
/// takes its place in time as NaN.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Window {
    #[serde(with = "gaps")]
    values: Vec<f32>,
    capacity: usize,
    /// Where the next value goes once the window is full.
    next: usize,
}

/// Samples for which a window makes room at once.
const GROWTH: usize = 64;

impl Window {
    /// An empty window of at most `capacity` samples (at least 1).
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { values: Vec::new(), capacity: capacity.max(1), next: 0 }
    }

    /// The same, which grows at other steps than windows that began together and were given another number.
    #[must_use]
    pub(crate) fn staggered(capacity: usize, number: u32) -> Self {
        let mut window = Self::new(capacity);
        window.values.reserve_exact((number as usize % GROWTH + 1).min(window.capacity));
        window
    }

    /// Adds the newest sample and drops the oldest if the window is full.
    pub fn push(&mut self, value: Option<f64>) {
        let value = value.map_or(f32::NAN, |value| value as f32);
        if self.values.len() < self.capacity {
            // Not doubled: of ten thousand machines that began together all would grow at the same step, by all they have.
            if self.values.len() == self.values.capacity() {
                self.values.reserve_exact(GROWTH.min(self.capacity - self.values.len()));
            }
            self.values.push(value);
        } else {
            self.values[self.next] = value;
        }
        self.next = (self.next + 1) % self.capacity;
    }

    /// Asks for what the next sample is going to need; see [`crate::bank::Bank::fetch`].
    pub(crate) fn fetch(&self) {
        // Where the next one goes, or the one before it.
        if let Some(place) = self.values.get(self.next).or(self.values.last()) {
            fetch(place);
        }
    }

    /// How many samples it holds, missing ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether nothing was pushed yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The sample `age` steps before the newest (0 = newest); `None` if missing or never seen.
    #[must_use]
    pub fn back(&self, age: usize) -> Option<f64> {
        let len = self.values.len();
        if age >= len {
            return None;
        }
        let newest = if len < self.capacity { len - 1 } else { (self.next + self.capacity - 1) % self.capacity };
        let value = self.values[(newest + len - age) % len];
        (!value.is_nan()).then_some(f64::from(value))
    }

    /// All samples, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = Option<f64>> + '_ {
        (0..self.len()).rev().map(|age| self.back(age))
    }

    /// All samples in two parts, oldest first; missing ones are NaN.
    pub(crate) fn parts(&self) -> [&[f32]; 2] {
        let full = self.values.len() == self.capacity;
        let (newer, older) = self.values.split_at(if full { self.next } else { 0 });
        [older, newer]
    }

    /// The mean of the newest `steps` samples that were measured.
    #[must_use]
    pub fn mean(&self, steps: usize) -> Option<f64> {
        let (sum, count) = (0..steps.min(self.len()))
            .filter_map(|age| self.back(age))
            .fold((0.0, 0_u32), |(sum, count), value| (sum + value, count + 1));
        (count > 0).then(|| sum / f64::from(count))
    }

    /// The largest of the newest `steps` samples that were measured.
    #[must_use]
    pub fn max(&self, steps: usize) -> Option<f64> {
        (0..steps.min(self.len())).filter_map(|age| self.back(age)).reduce(f64::max)
    }
}

/// NaN stands for a gap in memory; JSON knows no NaN, so that gaps are stored as `None`.
pub(crate) mod gaps {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(values: &[f32], serializer: S) -> Result<S::Ok, S::Error> {
        let options: Vec<Option<f32>> = values.iter().map(|value| value.is_finite().then_some(*value)).collect();
        options.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: FromIterator<f32>>(deserializer: D) -> Result<T, D::Error> {
        let options = Vec::<Option<f32>>::deserialize(deserializer)?;
        Ok(options.into_iter().map(|value| value.unwrap_or(f32::NAN)).collect())
    }
}

/// Serde knows arrays of up to 32 entries; longer ones are stored as sequences.
pub(crate) mod array {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer, const N: usize>(
        values: &[f32; N],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        values.as_slice().serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, const N: usize>(
        deserializer: D,
    ) -> Result<[f32; N], D::Error> {
        let values = Vec::<f32>::deserialize(deserializer)?;
        let count = values.len();
        values.try_into().map_err(|_| D::Error::invalid_length(count, &"as many numbers as were stored"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_order_and_gaps_through_wrapping() {
        let mut window = Window::new(3);
        assert_eq!(window.back(0), None);
        for value in [Some(1.0), None, Some(3.0), Some(4.0)] {
            window.push(value);
        }
        assert_eq!(window.iter().collect::<Vec<_>>(), [None, Some(3.0), Some(4.0)]);
        assert_eq!(window.back(0), Some(4.0));
        assert_eq!(window.back(2), None);
        assert_eq!(window.back(3), None);
        assert_eq!(window.mean(3), Some(3.5));
        assert_eq!(window.max(1), Some(4.0));
        window.push(None);
        assert_eq!(window.iter().collect::<Vec<_>>(), [Some(3.0), Some(4.0), None]);
        let [older, newer] = window.parts();
        assert_eq!((older[..].to_vec(), newer.len()), (vec![3.0], 2));
        assert!(newer[0] == 4.0 && newer[1].is_nan());
    }
}
