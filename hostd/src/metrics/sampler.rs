//! Measures each machine and the host, once an interval.
//!
//! A machine that is being moved is not probed at all: its last measurement stands in. So neither does a probe disturb
//! the migration, nor does the work of the migration look like demand of the machine.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::report::GuestRates;
use vmm::api::Metrics;

use super::capacity::Groups;
use super::host::{HostMeter, pressure};
use crate::api::types::{MachineStatus, Pressure, Usage};
use crate::clock::unix_ms;
use crate::machine::Machines;
use crate::machine::disk::allocated_bytes;
use crate::machine::entry::Entry;

/// How long a VMM may take to tell its counters.
const PATIENCE: Duration = Duration::from_secs(2);

/// For so long after its creation a machine is not counted: a boot says nothing about the load that follows, and a forecast
/// made from it would see contention everywhere.
const BOOT: Duration = Duration::from_secs(3);

/// One round of measurements.
#[derive(Clone, Debug, Default)]
pub struct Round {
    /// When.
    pub at_unix_ms: u64,
    /// Machines that could be measured.
    pub machines: Vec<(String, Usage)>,
    /// Their sum.
    pub host: Option<Usage>,
    /// The whole computer.
    pub system: Option<Usage>,
    /// Pressure.
    pub pressure: Option<Pressure>,
}

/// Run and wait time of one thread in nanoseconds.
type ThreadTimes = HashMap<u32, (u64, u64)>;

/// What was read of a machine.
#[derive(Debug)]
struct Reading {
    at: Instant,
    pid: u32,
    threads: ThreadTimes,
    metrics: Metrics,
}

/// Measures machines and host.
#[derive(Debug)]
pub struct Sampler {
    machines: Machines,
    host: HostMeter,
    groups: Groups,
    throttled_s: Option<f64>,
    readings: HashMap<String, Reading>,
}

impl Sampler {
    /// For the machines of this host.
    pub fn new(machines: Machines) -> Self {
        let groups = Groups::of_self();
        Self { machines, host: HostMeter::default(), groups, throttled_s: None, readings: HashMap::new() }
    }

    /// Measures everything once.
    pub async fn sample(&mut self) -> Round {
        let throttled_s = self.throttled_since_last();
        let mut round = Round { at_unix_ms: unix_ms(), ..Round::default() };
        let entries = self.machines.all();
        self.readings.retain(|name, _| entries.iter().any(|entry| &entry.record().name == name));
        for (entry, reading) in self.read_all(&entries).await {
            if let Some((name, usage)) = self.usage(&entry, reading, throttled_s) {
                round.machines.push((name, usage));
            }
        }
        if !round.machines.is_empty() || entries.is_empty() {
            round.host = Some(sum(round.machines.iter().map(|(_, usage)| usage)));
        }
        round.system = self.host.read();
        round.pressure = pressure();
        round
    }

    /// Reads all machines at the same time; `None` for those that are not to be probed or did not answer.
    async fn read_all(&self, entries: &[Arc<Entry>]) -> Vec<(Arc<Entry>, Option<Reading>)> {
        let mut tasks = Vec::new();
        for entry in entries {
            let entry = Arc::clone(entry);
            let machines = self.machines.clone();
            tasks.push(tokio::spawn(async move {
                let reading = read(&machines, &entry).await;
                (entry, reading)
            }));
        }
        let mut readings = Vec::new();
        for task in tasks {
            if let Ok(reading) = task.await {
                readings.push(reading);
            }
        }
        readings
    }

    fn usage(&mut self, entry: &Entry, reading: Option<Reading>, throttled_s: Option<f64>) -> Option<(String, Usage)> {
        let record = entry.record();
        let Some(reading) = reading else {
            self.readings.remove(&record.name);
            let moving = matches!(record.status, MachineStatus::Migrating | MachineStatus::InDoubt);
            let state = entry.state();
            let last = state.usage.filter(|_| moving || state.verifying);
            return last.map(|usage| (record.name, usage));
        };
        let before = self.readings.get(&record.name).filter(|before| before.pid == reading.pid);
        let usage = before.and_then(|before| rates(before, &reading, throttled_s, f64::from(record.vcpus)));
        let guest = before
            .and_then(|before| guest_rates(&before.metrics, &reading.metrics, reading.at.duration_since(before.at)));
        self.readings.insert(record.name.clone(), reading);
        let mut state = entry.state();
        let age_ms = unix_ms().saturating_sub(record.created_unix_ms);
        if state.usage.is_none() && u128::from(age_ms) < BOOT.as_millis() {
            return None;
        }
        // The first reading after a migration is no rate yet: the last measurement stands in once more.
        state.usage = usage.or(state.usage);
        state.rates = guest.or(state.rates);
        state.usage.map(|usage| (record.name, usage))
    }

    /// For how long the quota of hostd's group held its tasks back since the last round; `None` without a quota, where
    /// all waiting is waiting for the host's own processors.
    fn throttled_since_last(&mut self) -> Option<f64> {
        self.groups.cpu_quota()?;
        let now = self.groups.throttled_s()?;
        let before = self.throttled_s.replace(now)?;
        Some((now - before).max(0.0))
    }
}

async fn read(machines: &Machines, entry: &Arc<Entry>) -> Option<Reading> {
    if !matches!(entry.status(), MachineStatus::Running | MachineStatus::Paused) || entry.state().verifying {
        return None;
    }
    let pid = entry.process()?.id().pid;
    let client = entry.client().with_timeout(PATIENCE);
    let disks = entry.record().disks;
    let answer = tokio::task::spawn_blocking(move || {
        let allocated = allocated_bytes(&disks);
        let reading = Reading { at: Instant::now(), pid, threads: thread_times(pid), metrics: client.metrics().ok()? };
        Some((reading, client.machine().ok()?, allocated))
    });
    let (reading, info, allocated) = answer.await.ok()??;
    machines.observe(entry, &info);
    entry.state().disk_allocated_bytes = Some(allocated);
    Some(reading)
}

/// What a guest did between two readings of its VMM's counters. `None` if they are those of different processes.
pub fn guest_rates(before: &Metrics, now: &Metrics, time: Duration) -> Option<GuestRates> {
    let seconds = Some(time.as_secs_f64()).filter(|&seconds| seconds > 0.0)?;
    let rate = |counter: fn(&Metrics) -> u64| Some(counter(now).checked_sub(counter(before))? as f64 / seconds);
    Some(GuestRates {
        vcpu_cores: rate(|metrics| metrics.vcpu_us)? / 1e6,
        disk_bytes_per_second: rate(|metrics| metrics.disk_read_bytes + metrics.disk_write_bytes)?,
        network_bytes_per_second: rate(|metrics| metrics.net_receive_bytes + metrics.net_transmit_bytes)?,
    })
}

fn rates(before: &Reading, now: &Reading, throttled_s: Option<f64>, vcpus: f64) -> Option<Usage> {
    let seconds = now.at.duration_since(before.at).as_secs_f64();
    if seconds <= 0.0 {
        return None;
    }
    let (run_s, wait_s) = thread_seconds(&before.threads, &now.threads);
    let guest = guest_rates(&before.metrics, &now.metrics, now.at.duration_since(before.at))?;
    let new = &now.metrics;
    let cpu_cores = run_s / seconds;
    // Where a quota is in force, only the waiting that it caused is demand of these machines; other waiting is the
    // computer's other work. A machine cannot want more processors than it has, beside the VMM's own threads.
    let wait_s = throttled_s.map_or(wait_s, |throttled_s| wait_s.min(throttled_s));
    let cpu_demand_cores = (cpu_cores + wait_s / seconds).min(vcpus.max(cpu_cores));
    Some(Usage {
        cpu_cores,
        cpu_demand_cores,
        memory_mib: (new.memory_resident_bytes + new.overhead_bytes) as f64 / f64::from(1 << 20),
        disk_bytes_per_second: guest.disk_bytes_per_second,
        network_bytes_per_second: guest.network_bytes_per_second,
    })
}

/// Run and wait time of a process in seconds between two readings. Threads come and go, so each is compared with itself.
fn thread_seconds(before: &ThreadTimes, now: &ThreadTimes) -> (f64, f64) {
    let mut total = (0, 0);
    for (thread, (run, wait)) in now {
        let (run_before, wait_before) = before.get(thread).copied().unwrap_or_default();
        total.0 += run.saturating_sub(run_before);
        total.1 += wait.saturating_sub(wait_before);
    }
    (total.0 as f64 / 1e9, total.1 as f64 / 1e9)
}

/// Run and wait time of each thread (`/proc/PID/task/TID/schedstat`, Documentation/scheduler/sched-stats.rst).
fn thread_times(pid: u32) -> ThreadTimes {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return ThreadTimes::new() };
    let times = tasks.flatten().filter_map(|task| {
        let thread = task.file_name().to_str()?.parse().ok()?;
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        let mut fields = text.split_whitespace().map(|field| field.parse::<u64>().ok());
        Some((thread, (fields.next()??, fields.next()??)))
    });
    times.collect()
}

/// The sum of several measurements.
pub fn sum<'a>(usages: impl Iterator<Item = &'a Usage>) -> Usage {
    usages.fold(Usage::default(), |total, usage| Usage {
        cpu_cores: total.cpu_cores + usage.cpu_cores,
        cpu_demand_cores: total.cpu_demand_cores + usage.cpu_demand_cores,
        memory_mib: total.memory_mib + usage.memory_mib,
        disk_bytes_per_second: total.disk_bytes_per_second + usage.disk_bytes_per_second,
        network_bytes_per_second: total.network_bytes_per_second + usage.network_bytes_per_second,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_time_and_a_thread_that_went_is_not_negative() {
        let before = thread_times(std::process::id());
        assert!(!before.is_empty(), "the kernel has schedstat");
        let mut sum = 0_u64;
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(50) {
            sum = std::hint::black_box(sum + 1);
        }
        let now = thread_times(std::process::id());
        assert!(thread_seconds(&before, &now).0 > 0.0);
        let gone = HashMap::from([(1, (5_000_000_000, 0)), (2, (1_000_000_000, 0))]);
        let left = HashMap::from([(2, (1_500_000_000, 250_000_000))]);
        assert_eq!(thread_seconds(&gone, &left), (0.5, 0.25));
    }

    #[test]
    fn only_throttled_waiting_is_demand_where_a_quota_is_in_force() {
        let at = Instant::now();
        let reading = |seconds, run, wait| Reading {
            at: at + Duration::from_secs(seconds),
            pid: 1,
            threads: HashMap::from([(1, (run, wait))]),
            metrics: Metrics::default(),
        };
        let (before, now) = (reading(0, 0, 0), reading(1, 400_000_000, 500_000_000));
        let demand = |throttled, vcpus| rates(&before, &now, throttled, vcpus).unwrap().cpu_demand_cores;
        assert!((demand(None, 4.0) - 0.9).abs() < 1e-9);
        assert!((demand(Some(0.1), 4.0) - 0.5).abs() < 1e-9);
        assert!((demand(Some(0.0), 4.0) - 0.4).abs() < 1e-9);
    }
}
