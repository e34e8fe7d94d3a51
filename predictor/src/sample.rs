//! What is measured: resources, samples of machines, and rates made from counters.

use serde::{Deserialize, Serialize};
use std::ops::{Index, IndexMut};

/// Above this a measurement is taken for a fault of the meter: 1e15 is a petabyte a second, or a million billion cores.
pub const LARGEST_VALUE: f64 = 1e15;

/// What a pool can run out of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// Processor time in cores (1.0 = one core busy all the time).
    Cpu,
    /// Memory in bytes; not compressible: running out of it kills instead of slowing down.
    Memory,
    /// Disk traffic in bytes a second, reads and writes.
    Io,
    /// Network traffic in bytes a second, both directions.
    Network,
}

impl Resource {
    /// All of them, in the order in which [`PerResource`] holds them.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Memory, Self::Io, Self::Network];

    /// Its name as it stands in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Io => "io",
            Self::Network => "network",
        }
    }

    /// A quantity of it for people: `3.20 cores`, `1.5 GiB`, `80.0 MiB/s`.
    #[must_use]
    pub fn quantity(self, value: f64) -> String {
        match self {
            Self::Cpu => format!("{value:.2} cores"),
            Self::Memory => bytes(value),
            Self::Io | Self::Network => format!("{}/s", bytes(value)),
        }
    }
}

impl std::fmt::Display for Resource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn bytes(value: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut scaled = value;
    let mut unit = 0;
    while scaled.abs() >= 1024.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    format!("{scaled:.1} {}", UNITS[unit])
}

/// One value for each resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PerResource<T> {
    /// For [`Resource::Cpu`].
    pub cpu: T,
    /// For [`Resource::Memory`].
    pub memory: T,
    /// For [`Resource::Io`].
    pub io: T,
    /// For [`Resource::Network`].
    pub network: T,
}

impl<T> PerResource<T> {
    /// Each value from its resource.
    pub fn from_fn(mut make: impl FnMut(Resource) -> T) -> Self {
        Self {
            cpu: make(Resource::Cpu),
            memory: make(Resource::Memory),
            io: make(Resource::Io),
            network: make(Resource::Network),
        }
    }

    /// Resources and values, in the order of [`Resource::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Resource, &T)> {
        Resource::ALL.into_iter().map(|resource| (resource, &self[resource]))
    }
}

impl<T> Index<Resource> for PerResource<T> {
    type Output = T;

    fn index(&self, resource: Resource) -> &T {
        match resource {
            Resource::Cpu => &self.cpu,
            Resource::Memory => &self.memory,
            Resource::Io => &self.io,
            Resource::Network => &self.network,
        }
    }
}

impl<T> IndexMut<Resource> for PerResource<T> {
    fn index_mut(&mut self, resource: Resource) -> &mut T {
        match resource {
            Resource::Cpu => &mut self.cpu,
            Resource::Memory => &mut self.memory,
            Resource::Io => &mut self.io,
            Resource::Network => &mut self.network,
        }
    }
}

/// What one machine used in one sampling interval. A value that was not measured is `None` and not zero; a value that cannot
/// be (NaN, infinite, negative, above [`LARGEST_VALUE`]) counts as not measured.
///
/// CPU should be *demand*: time run plus time spent waiting for a core (steal, throttled time of the cgroup), since the time
/// run alone can never exceed the capacity that it is compared with.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Sample {
    /// Name of the machine.
    pub machine: String,
    /// Units as in [`Resource`].
    pub values: PerResource<Option<f64>>,
}

/// `value` if it can be a measurement, else `None`.
#[must_use]
pub fn plausible(value: Option<f64>) -> Option<f64> {
    value.filter(|value| (0.0..=LARGEST_VALUE).contains(value))
}

/// Makes a rate from a counter that only grows, such as bytes read or nanoseconds run.
///
/// A counter that became smaller (restart, overflow, another process), a clock that stood still or went back, and a gap longer
/// than `longest_gap_s` give `None`, and counting starts anew from there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RateMeter {
    longest_gap_s: f64,
    last: Option<(f64, u64)>,
}

impl RateMeter {
    /// A meter that takes readings further apart than `longest_gap_s` seconds for a gap.
    #[must_use]
    pub fn new(longest_gap_s: f64) -> Self {
        Self { longest_gap_s, last: None }
    }

    /// The growth of the counter a second since the previous reading. `now_s` is any monotonic time in seconds.
    pub fn read(&mut self, counter: u64, now_s: f64) -> Option<f64> {
        if !now_s.is_finite() {
            self.last = None;
            return None;
        }
        let (then_s, before) = self.last.replace((now_s, counter))?;
        let elapsed_s = now_s - then_s;
        if elapsed_s <= 0.0 || elapsed_s > self.longest_gap_s {
            return None;
        }
        let grown = counter.checked_sub(before)?;
        plausible(Some(grown as f64 / elapsed_s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counter_resets_gaps_and_clock_steps_are_missing_samples() {
        let mut meter = RateMeter::new(10.0);
        assert_eq!(meter.read(1_000, 0.0), None, "one reading is no rate");
        assert_eq!(meter.read(3_000, 2.0), Some(1_000.0));
        assert_eq!(meter.read(500, 3.0), None, "the counter went back");
        assert_eq!(meter.read(700, 4.0), Some(200.0), "and counts from there");
        assert_eq!(meter.read(900, 4.0), None, "the clock stood still");
        assert_eq!(meter.read(1_000, 3.0), None, "the clock went back");
        assert_eq!(meter.read(1_100, 4.0), Some(100.0));
        assert_eq!(meter.read(9_000, 60.0), None, "a gap");
        assert_eq!(meter.read(9_010, f64::NAN), None);
        assert_eq!(meter.read(9_020, 62.0), None);
        assert_eq!(meter.read(9_030, 63.0), Some(10.0));
    }

    #[test]
    fn implausible_values_are_missing() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 1e16] {
            assert_eq!(plausible(Some(bad)), None, "{bad}");
        }
        assert_eq!(plausible(Some(0.0)), Some(0.0));
        assert_eq!(plausible(None), None);
    }

    #[test]
    fn quantities_read_well() {
        assert_eq!(Resource::Cpu.quantity(3.2), "3.20 cores");
        assert_eq!(Resource::Memory.quantity(1.5 * 1024.0 * 1024.0 * 1024.0), "1.5 GiB");
        assert_eq!(Resource::Io.quantity(80.0 * 1024.0 * 1024.0), "80.0 MiB/s");
    }
}
