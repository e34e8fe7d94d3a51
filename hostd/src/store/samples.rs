//! History of measurements, down-sampled: every sample for two hours, one value a minute for a week, one a quarter of an
//! hour for ninety days. Coarser values are means of what fell into their span.

use redb::{Durability, ReadableTable};

use super::levels::{Key, LEVELS, Value};
use super::{Store, StoreError};
use crate::api::types::Usage;

impl Store {
    /// Adds one measurement of each series. `durable` also puts everything added since on stable storage.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn add_samples(&self, at_unix_ms: u64, samples: &[(String, Usage)], durable: bool) -> Result<(), StoreError> {
        self.write(|write| {
            let durability = if durable { Durability::Immediate } else { Durability::None };
            write.set_durability(durability).map_err(|error| StoreError::Access(Box::new(error.into())))?;
            for level in &LEVELS {
                let mut table = write.open_table(level.table)?;
                let start = at_unix_ms - at_unix_ms % level.span_ms;
                for (series, usage) in samples {
                    let before = table.get((series.as_str(), start))?.map(|value| value.value());
                    table.insert((series.as_str(), start), merge(before, usage))?;
                }
            }
            Ok(())
        })
    }

    /// Names of the series that begin with `prefix` and have single samples.
    ///
    /// # Errors
    ///
    /// If they cannot be read.
    pub fn series(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.read(|read| names(&read.open_table(LEVELS[0].table)?, prefix))
    }

    /// Measurements of a series since `since_unix_ms` in the finest resolution that reaches back so far.
    ///
    /// # Errors
    ///
    /// If they cannot be read.
    pub fn samples(&self, series: &str, since_unix_ms: u64, now_unix_ms: u64) -> Result<Vec<(u64, Usage)>, StoreError> {
        let age = now_unix_ms.saturating_sub(since_unix_ms);
        let level = LEVELS.iter().find(|level| level.keep_ms >= age).unwrap_or(&LEVELS[LEVELS.len() - 1]);
        self.read(|read| {
            let table = read.open_table(level.table)?;
            let mut samples = Vec::new();
            for entry in table.range((series, since_unix_ms)..=(series, u64::MAX))? {
                let (key, value) = entry?;
                samples.push((key.value().1, usage(value.value())));
            }
            Ok(samples)
        })
    }

    /// Forgets measurements that are older than their resolution keeps, and returns how many.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn expire_samples(&self, now_unix_ms: u64) -> Result<usize, StoreError> {
        self.write(|write| {
            let mut expired = 0;
            for level in &LEVELS {
                let oldest = now_unix_ms.saturating_sub(level.keep_ms);
                let mut table = write.open_table(level.table)?;
                // Series by series: nothing is read of what stays, which is nearly all.
                for series in names(&table, "")? {
                    table.retain_in((series.as_str(), 0)..(series.as_str(), oldest), |_, _| {
                        expired += 1;
                        false
                    })?;
                }
            }
            Ok(expired)
        })
    }
}

/// The series in `table` that begin with `prefix`, in order; one look-up for each.
fn names(table: &impl ReadableTable<Key, Value>, prefix: &str) -> Result<Vec<String>, StoreError> {
    use std::ops::Bound::{Excluded, Included, Unbounded};
    let mut found: Vec<String> = Vec::new();
    loop {
        let after = match found.last() {
            Some(last) => Excluded((last.as_str(), u64::MAX)),
            None => Included((prefix, 0)),
        };
        let next = table.range::<(&str, u64)>((after, Unbounded))?.next().transpose()?;
        match next.map(|(key, _)| key.value().0.to_owned()).filter(|series| series.starts_with(prefix)) {
            Some(series) => found.push(series),
            None => return Ok(found),
        }
    }
}

fn merge(before: Option<[f64; 6]>, usage: &Usage) -> [f64; 6] {
    let [a, b, c, d, e, count] = before.unwrap_or_default();
    let mean = |old: f64, new: f64| (old * count + new) / (count + 1.0);
    [
        mean(a, usage.cpu_cores),
        mean(b, usage.cpu_demand_cores),
        mean(c, usage.memory_mib),
        mean(d, usage.disk_bytes_per_second),
        mean(e, usage.network_bytes_per_second),
        count + 1.0,
    ]
}

fn usage(value: [f64; 6]) -> Usage {
    let [cpu_cores, cpu_demand_cores, memory_mib, disk_bytes_per_second, network_bytes_per_second, _] = value;
    Usage { cpu_cores, cpu_demand_cores, memory_mib, disk_bytes_per_second, network_bytes_per_second }
}

#[cfg(test)]
mod tests {
    use super::super::levels::HOUR_MS;
    use super::*;

    const START: u64 = 1_800_000_000_000;

    fn cpu(cores: f64) -> Vec<(String, Usage)> {
        vec![("machine/vm1".to_owned(), Usage { cpu_cores: cores, ..Usage::default() })]
    }

    #[test]
    fn old_samples_become_means_and_then_go() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("s.redb")).unwrap();
        for second in 0..120_u64 {
            store.add_samples(START + second * 1000, &cpu(second as f64), second % 60 == 0).unwrap();
        }
        let now = START + 120_000;
        assert_eq!(store.samples("machine/vm1", START, now).unwrap().len(), 120);
        assert_eq!(store.samples("machine/vm10", START, now).unwrap().len(), 0);
        let later = now + 3 * HOUR_MS;
        assert_eq!(store.expire_samples(later).unwrap(), 120);
        let minutes = store.samples("machine/vm1", START, later).unwrap();
        let means: Vec<f64> = minutes.iter().map(|(_, usage)| usage.cpu_cores).collect();
        assert_eq!(means, [29.5, 89.5]);
        assert_eq!(store.expire_samples(later + 8 * 24 * HOUR_MS).unwrap(), 2);
        assert_eq!(store.expire_samples(later + 91 * 24 * HOUR_MS).unwrap(), 1);
    }

    #[test]
    fn each_series_loses_what_is_old_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("s.redb")).unwrap();
        let add = |at, names: &[&str]| {
            let samples: Vec<_> = names.iter().map(|name| ((*name).to_owned(), Usage::default())).collect();
            store.add_samples(at, &samples, false).unwrap();
        };
        add(START, &["host", "machine/a", "machine/b"]);
        add(START + 3 * HOUR_MS, &["host", "machine/b", "machine/c"]);
        let now = START + 3 * HOUR_MS;
        assert_eq!(store.expire_samples(now).unwrap(), 3);
        assert_eq!(store.expire_samples(now).unwrap(), 0);
        assert_eq!(store.series("").unwrap(), ["host", "machine/b", "machine/c"]);
        let kept = store.samples("machine/b", START + 2 * HOUR_MS, now).unwrap();
        assert_eq!(kept.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [now]);
        // At the edge: kept for exactly as long as is promised.
        assert_eq!(store.expire_samples(now + 2 * HOUR_MS).unwrap(), 0);
        assert_eq!(store.expire_samples(now + 2 * HOUR_MS + 1).unwrap(), 3);
    }

    #[test]
    fn series_are_listed_once_each() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("s.redb")).unwrap();
        assert_eq!(store.series("machine/").unwrap(), Vec::<String>::new());
        let names = ["host", "machine/a", "machine/b", "other"];
        let samples: Vec<(String, Usage)> = names.iter().map(|name| ((*name).to_owned(), Usage::default())).collect();
        for step in 0..3 {
            store.add_samples(START + step, &samples, false).unwrap();
        }
        assert_eq!(store.series("machine/").unwrap(), ["machine/a", "machine/b"]);
    }
}
