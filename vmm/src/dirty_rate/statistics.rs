//! From counted pages to a rate: a pure function.

use std::time::Duration;

use migration::guest::PAGE_BYTES;

use crate::api::{DirtyLook, DirtyRate, DirtyRateSource};

/// Of the standard normal distribution, for an interval that holds the true value with 95 %.
const Z: f64 = 1.96;

/// If so much of what is resident has changed, what would have changed beyond it cannot be seen.
const SATURATED: f64 = 0.9;

/// One look back at the sampled pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Look {
    /// Since the first look.
    pub after: Duration,
    /// Pages that differ from it.
    pub changed: u64,
}

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counted {
    /// Pages of the machine.
    pub memory_pages: u64,
    /// Pages that were chosen at random from all of them.
    pub sampled: u64,
    /// Those of them that had memory at the last look.
    pub resident: u64,
    /// Looks back, the earliest first.
    pub looks: Vec<Look>,
}

/// Least and most probable share if `hits` of `trials` were hit, with 95 % (Wilson, J. Am. Stat. Assoc. 22, 1927): other
/// than the usual approximation it is right for none, for few and for all.
fn wilson(hits: u64, trials: u64) -> (f64, f64) {
    if trials == 0 {
        return (0.0, 1.0);
    }
    let (n, share) = (trials as f64, hits.min(trials) as f64 / trials as f64);
    let middle = share + Z * Z / (2.0 * n);
    let half = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    (((middle - half) / scale).max(0.0), ((middle + half) / scale).min(1.0))
}

/// Bytes dirtied per second, and how sure that is.
///
/// The rate is that of the last look. If the first one saw significantly more in its time, the guest writes the same pages again
/// and again: the peak is then the rate of the first look, and the working set what the last one saw. A migration has to send
/// at most the working set in each round, and gains from a round only if it takes less than `working set / peak`.
pub fn estimate(counted: &Counted) -> DirtyRate {
    let memory = (counted.memory_pages * PAGE_BYTES) as f64;
    let looks: Vec<DirtyLook> = counted
        .looks
        .iter()
        .map(|look| {
            let (low, high) = wilson(look.changed, counted.sampled);
            let share = look.changed as f64 / counted.sampled.max(1) as f64;
            let after_ms = look.after.as_secs_f64() * 1e3;
            DirtyLook { after_ms, bytes: share * memory, low_bytes: low * memory, high_bytes: high * memory }
        })
        .collect();
    let mut rate = DirtyRate {
        source: DirtyRateSource::Sampled,
        sampled_pages: counted.sampled,
        resident_pages: counted.resident,
        ..DirtyRate::default()
    };
    let per_second = |bytes: f64, look: &DirtyLook| bytes / (look.after_ms / 1e3).max(1e-3);
    if let (Some(first), Some(last)) = (looks.first(), looks.last())
        && counted.sampled > 0
    {
        let whole = per_second(last.bytes, last);
        let repeats = per_second(first.low_bytes, first) > per_second(last.high_bytes, last);
        rate.bytes_per_second = Some(whole);
        rate.low_bytes_per_second = Some(per_second(last.low_bytes, last));
        rate.high_bytes_per_second = Some(per_second(last.high_bytes, last));
        rate.peak_bytes_per_second = Some(if repeats { per_second(first.bytes, first) } else { whole });
        rate.working_set_bytes = repeats.then_some(last.bytes);
        let changed = counted.looks.last().map_or(0, |look| look.changed);
        rate.lower_bound = changed > 0 && changed as f64 >= SATURATED * counted.resident as f64;
    }
    DirtyRate { looks, ..rate }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: f64 = 1048576.0;

    fn counted(changed: [u64; 2], sampled: u64, resident: u64) -> Counted {
        let looks = [100, 1000].map(Duration::from_millis).into_iter().zip(changed);
        let looks = looks.map(|(after, changed)| Look { after, changed }).collect();
        Counted { memory_pages: 262_144, sampled, resident, looks }
    }

    #[test]
    fn a_share_of_the_memory_over_the_interval() {
        // A tenth of a GiB in a second, steadily.
        let rate = estimate(&counted([41, 410], 4096, 3000));
        assert!((rate.bytes_per_second.unwrap() / MIB - 102.5).abs() < 0.1, "{rate:?}");
        assert!((rate.low_bytes_per_second.unwrap() / MIB - 93.5).abs() < 1.0, "{rate:?}");
        assert!((rate.high_bytes_per_second.unwrap() / MIB - 112.3).abs() < 1.0, "{rate:?}");
        assert_eq!((rate.lower_bound, rate.working_set_bytes), (false, None));
        assert_eq!(rate.peak_bytes_per_second, rate.bytes_per_second);
    }

    #[test]
    fn pages_that_are_written_again_and_again_are_a_working_set() {
        let rate = estimate(&counted([400, 410], 4096, 3000));
        assert!((rate.peak_bytes_per_second.unwrap() / MIB - 1000.0).abs() < 1.0, "{rate:?}");
        assert!((rate.working_set_bytes.unwrap() / MIB - 102.5).abs() < 0.1, "{rate:?}");
    }

    #[test]
    fn when_nearly_all_has_changed_more_cannot_be_seen() {
        assert!(estimate(&counted([900, 3000], 4096, 3000)).lower_bound);
        assert!(!estimate(&counted([300, 2500], 4096, 3000)).lower_bound);
        let idle = estimate(&counted([0, 0], 4096, 0));
        assert_eq!((idle.bytes_per_second, idle.lower_bound), (Some(0.0), false));
        assert!(idle.high_bytes_per_second.unwrap() < 1.1 * MIB, "an idle guest is known to be idle: {idle:?}");
    }

    #[test]
    fn nothing_sampled_says_nothing() {
        assert_eq!(estimate(&counted([0, 0], 0, 0)).bytes_per_second, None);
        assert_eq!(estimate(&Counted::default()).bytes_per_second, None);
    }

    proptest! {
        #[test]
        fn the_interval_holds_the_estimate_and_narrows(sampled in 1u64..40_000, share in 0.0f64..=1.0, ms in 1u64..10_000) {
            let look = |sampled: u64| {
                let changed = (sampled as f64 * share).round() as u64;
                let looks = vec![Look { after: Duration::from_millis(ms), changed }];
                estimate(&Counted { memory_pages: 1 << 20, sampled, resident: sampled, looks })
            };
            let rate = look(sampled);
            let values = [rate.low_bytes_per_second, rate.bytes_per_second, rate.high_bytes_per_second].map(Option::unwrap);
            prop_assert!(values[0] <= values[1] && values[1] <= values[2] * (1.0 + 1e-9), "{:?}", values);
            prop_assert!(values[0] >= 0.0 && values[2] <= (1u64 << 32) as f64 / (ms as f64 / 1e3) * (1.0 + 1e-9));
            let width = |rate: &DirtyRate| rate.high_bytes_per_second.unwrap() - rate.low_bytes_per_second.unwrap();
            prop_assert!(width(&look(sampled * 16)) <= width(&rate));
        }

        /// Pages are drawn from a memory of which a known share has changed: the interval holds the truth about as often as it says.
        #[test]
        fn the_interval_holds_the_truth(seed: u64, share in 0.001f64..0.999) {
            let mut state = seed;
            let mut held = 0;
            for _ in 0..200 {
                let hits = (0..2048).filter(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    ((state >> 11) as f64) < share * (1u64 << 53) as f64
                });
                let (low, high) = wilson(hits.count() as u64, 2048);
                held += u32::from(low <= share && share <= high);
            }
            // 190 are expected; fewer than 170 has a probability of about 10^-8.
            prop_assert!(held >= 170, "{} of 200", held);
        }
    }
}
