//! What a migration will cost: total time and downtime, from the machine's size, its dirty rate and the bandwidth, corrected by
//! what finished migrations took.

use serde::{Deserialize, Serialize};

/// What a migration's duration depends on.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct MigrationShape {
    /// Memory that is not zero, in bytes.
    pub memory_bytes: f64,
    /// Memory that the guest dirties, in bytes a second.
    pub dirty_bytes_per_second: f64,
    /// How much memory it dirties over and over; 0 = not known, all of it.
    pub working_set_bytes: f64,
    /// Disk that is not a hole, in bytes; 0 for storage that both hosts reach.
    pub disk_bytes: f64,
    /// Disk that the guest dirties, in bytes a second.
    pub disk_dirty_bytes_per_second: f64,
    /// Bandwidth that the migration may use, in bytes a second.
    pub bandwidth_bytes_per_second: f64,
    /// Switchover begins when what is left would take at most this long.
    pub downtime_limit_ms: f64,
}

/// What to expect of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Total migration time in milliseconds.
    pub total_ms: f64,
    /// Total migration time that is not exceeded with 90 %.
    pub total_ms_p90: f64,
    /// Downtime in milliseconds.
    pub downtime_ms: f64,
    /// Downtime that is not exceeded with 90 %.
    pub downtime_ms_p90: f64,
    /// Bytes to be sent.
    pub bytes: f64,
    /// Whether pre-copy alone gets there: if not, the machine is slowed down or post-copy takes over.
    pub converges: bool,
}

/// What pre-copy will do by its own arithmetic.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Arithmetic {
    bytes: f64,
    last_bytes: f64,
    converges: bool,
}

/// The most rounds that the arithmetic plays through.
const ROUNDS: usize = 30;

fn arithmetic(shape: &MigrationShape) -> Arithmetic {
    let positive = |x: f64| if x.is_finite() { x.max(0.0) } else { 0.0 };
    let bandwidth = positive(shape.bandwidth_bytes_per_second).max(1.0);
    let memory = positive(shape.memory_bytes);
    let set = positive(shape.working_set_bytes);
    let set = if set > 0.0 { set.min(memory) } else { memory };
    let disk = positive(shape.disk_bytes);
    let (memory_rate, disk_rate) =
        (positive(shape.dirty_bytes_per_second), positive(shape.disk_dirty_bytes_per_second));
    let goal = bandwidth * positive(shape.downtime_limit_ms).max(1.0) / 1000.0;
    let mut left = memory + disk;
    let mut bytes = 0.0;
    for _ in 0..ROUNDS {
        if left <= goal {
            return Arithmetic { bytes: bytes + left, last_bytes: left, converges: true };
        }
        bytes += left;
        let seconds = left / bandwidth;
        // A page written twice in a round is sent once: the working set bounds what a round leaves behind.
        let next = (memory_rate * seconds).min(set) + (disk_rate * seconds).min(disk);
        if next > 0.95 * left {
            return Arithmetic { bytes: bytes + next, last_bytes: next, converges: next <= goal };
        }
        left = next;
    }
    Arithmetic { bytes: bytes + left, last_bytes: left, converges: left <= goal }
}

/// A line `milliseconds = fixed + factor x arithmetic milliseconds`, learned by recursive least squares with forgetting from a
/// prior, and the spread of log(measured / predicted).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Line {
    fixed: f64,
    factor: f64,
    covariance: [f64; 3],
    /// Mean square of log(measured / predicted).
    spread: f64,
    seen: f64,
}

impl Line {
    fn new(fixed: f64, factor: f64) -> Self {
        Self { fixed, factor, covariance: [1.0, 0.0, 1.0], spread: 0.16, seen: 4.0 }
    }

    fn predict(&self, arithmetic_ms: f64) -> f64 {
        (self.fixed + self.factor * arithmetic_ms).max(0.1)
    }

    /// Errors are weighed relative to the size of the prediction: ten per cent of an hour counts as ten per cent of a second.
    fn learn(&mut self, arithmetic_ms: f64, measured_ms: f64) {
        let predicted = self.predict(arithmetic_ms);
        let log = (measured_ms.max(0.1) / predicted).ln().clamp(-3.0, 3.0);
        self.seen += 1.0;
        self.spread += (log * log - self.spread) / self.seen.min(30.0);
        let unit = predicted.max(1.0);
        let (x0, x1) = (self.unit_fixed() / unit, self.unit_factor() * arithmetic_ms / unit);
        let [a, b, c] = self.covariance;
        let (g0, g1) = (a * x0 + b * x1, b * x0 + c * x1);
        let noise = 0.05 + x0 * g0 + x1 * g1;
        let error = ((measured_ms - predicted) / unit).clamp(-3.0, 3.0);
        self.fixed = (self.fixed + self.unit_fixed() * g0 / noise * error).max(0.0);
        self.factor = (self.factor + self.unit_factor() * g1 / noise * error).clamp(0.05, 50.0);
        let forget = 0.98;
        self.covariance = [
            ((a - g0 * g0 / noise) / forget).min(10.0),
            (b - g0 * g1 / noise) / forget,
            ((c - g1 * g1 / noise) / forget).min(10.0),
        ];
    }

    /// Scales in which both numbers are about one.
    fn unit_fixed(&self) -> f64 {
        100.0
    }

    fn unit_factor(&self) -> f64 {
        1.0
    }

    fn p90(&self, predicted: f64) -> f64 {
        predicted * (1.2816 * self.spread.sqrt()).exp()
    }
}

/// Predicts the cost of migrations and learns from finished ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CostModel {
    total: Line,
    downtime: Line,
    finished: u64,
}

impl Default for CostModel {
    /// What is assumed before the first migration: 300 ms of preparation, 10 ms of switchover, bandwidth used to 90 %.
    fn default() -> Self {
        Self { total: Line::new(300.0, 1.1), downtime: Line::new(10.0, 1.1), finished: 0 }
    }
}

impl CostModel {
    /// What a migration of that shape will take.
    #[must_use]
    pub fn predict(&self, shape: &MigrationShape) -> Cost {
        let (sent, total_line, last_line) = Self::lines(shape);
        let total_ms = self.total.predict(total_line);
        let downtime_ms = self.downtime.predict(last_line);
        Cost {
            total_ms,
            total_ms_p90: self.total.p90(total_ms),
            downtime_ms,
            downtime_ms_p90: self.downtime.p90(downtime_ms),
            bytes: sent.bytes,
            converges: sent.converges,
        }
    }

    /// Learns what a completed migration of that shape took. Measurements that cannot be are left out.
    pub fn observe(&mut self, shape: &MigrationShape, total_ms: f64, downtime_ms: f64) {
        let sound = |ms: f64| ms.is_finite() && ms >= 0.0;
        if !(sound(total_ms) && sound(downtime_ms)) {
            return;
        }
        let (_, total_line, last_line) = Self::lines(shape);
        self.total.learn(total_line, total_ms);
        self.downtime.learn(last_line, downtime_ms);
        self.finished += 1;
    }

    /// How many migrations it has learned from.
    #[must_use]
    pub fn finished(&self) -> u64 {
        self.finished
    }

    /// The arithmetic's bytes, and its milliseconds for all and for the last round.
    fn lines(shape: &MigrationShape) -> (Arithmetic, f64, f64) {
        let sent = arithmetic(shape);
        let bandwidth = shape.bandwidth_bytes_per_second;
        let bandwidth = if bandwidth.is_finite() { bandwidth.max(1.0) } else { 1.0 };
        let longest = 1e12;
        (sent, (1000.0 * sent.bytes / bandwidth).min(longest), (1000.0 * sent.last_bytes / bandwidth).min(longest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = 1024.0 * 1024.0;

    fn shape(memory_mib: f64, dirty_mib: f64) -> MigrationShape {
        MigrationShape {
            memory_bytes: memory_mib * MIB,
            dirty_bytes_per_second: dirty_mib * MIB,
            bandwidth_bytes_per_second: 1000.0 * MIB,
            downtime_limit_ms: 50.0,
            ..MigrationShape::default()
        }
    }

    #[test]
    fn arithmetic_grows_with_memory_and_dirty_rate() {
        let idle = arithmetic(&shape(1024.0, 0.0));
        let busy = arithmetic(&shape(1024.0, 500.0));
        let lost = arithmetic(&shape(1024.0, 2000.0));
        assert!((idle.bytes / MIB - 1024.0).abs() < 1e-6 && idle.converges);
        assert!(busy.bytes > 1.9 * idle.bytes && busy.converges, "{busy:?}");
        assert!(!lost.converges && lost.last_bytes >= 1000.0 * MIB, "{lost:?}");
        let bounded = arithmetic(&MigrationShape { working_set_bytes: 20.0 * MIB, ..shape(1024.0, 2000.0) });
        assert!(bounded.converges, "a small working set fits into the downtime: {bounded:?}");
    }

    #[test]
    fn learns_a_slower_link_and_a_fixed_cost_from_finished_migrations() {
        let mut model = CostModel::default();
        // The truth: 800 ms fixed, and only half of the bandwidth; downtime 25 ms and half the bandwidth.
        let truth = |shape: &MigrationShape| {
            let (_, total, last) = CostModel::lines(shape);
            (800.0 + 2.0 * total, 25.0 + 2.0 * last)
        };
        for i in 0..40 {
            let shape = shape(200.0 + f64::from(i * 97 % 1900), f64::from(i * 13 % 300));
            let (total, downtime) = truth(&shape);
            model.observe(&shape, total, downtime);
        }
        let new = shape(3000.0, 100.0);
        let (total, downtime) = truth(&new);
        let cost = model.predict(&new);
        assert!((cost.total_ms / total - 1.0).abs() < 0.15, "{cost:?} against {total}");
        assert!((cost.downtime_ms / downtime - 1.0).abs() < 0.25, "{cost:?} against {downtime}");
        assert!(cost.total_ms_p90 > cost.total_ms && cost.downtime_ms_p90 > cost.downtime_ms);
    }

    #[test]
    fn absurd_shapes_and_measurements_give_finite_costs() {
        let mut model = CostModel::default();
        for value in [f64::NAN, f64::INFINITY, -5.0, 0.0, 1e300] {
            let shape = MigrationShape {
                memory_bytes: value,
                dirty_bytes_per_second: value,
                working_set_bytes: value,
                disk_bytes: value,
                disk_dirty_bytes_per_second: value,
                bandwidth_bytes_per_second: value,
                downtime_limit_ms: value,
            };
            model.observe(&shape, value, value);
            let cost = model.predict(&shape);
            assert!(
                cost.total_ms.is_finite() && cost.downtime_ms.is_finite() && cost.total_ms > 0.0,
                "{value}: {cost:?}"
            );
        }
    }
}
