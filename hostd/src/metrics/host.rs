//! The whole computer: processors, memory, disks, network, pressure.

use std::time::Instant;

use crate::api::types::{Pressure, Usage};

/// Counters of the computer at one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    busy_ticks: u64,
    disk_bytes: u64,
    network_bytes: u64,
}

/// Turns counters into rates.
#[derive(Debug, Default)]
pub struct HostMeter {
    last: Option<(Instant, Counters)>,
}

impl HostMeter {
    /// What the computer used since the last call; `None` at the first.
    pub fn read(&mut self) -> Option<Usage> {
        let now = Instant::now();
        let counters = Counters {
            busy_ticks: busy_ticks(&read("/proc/stat")),
            disk_bytes: disk_bytes(&read("/proc/diskstats")),
            network_bytes: network_bytes(&read("/proc/net/dev")),
        };
        let (then, before) = self.last.replace((now, counters))?;
        let seconds = now.duration_since(then).as_secs_f64().max(1e-3);
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        let cpu_cores = rate(counters.busy_ticks, before.busy_ticks) / ticks_per_second();
        Some(Usage {
            cpu_cores,
            cpu_demand_cores: cpu_cores,
            memory_mib: memory_used_mib(&read("/proc/meminfo")),
            disk_bytes_per_second: rate(counters.disk_bytes, before.disk_bytes),
            network_bytes_per_second: rate(counters.network_bytes, before.network_bytes),
        })
    }
}

/// Pressure now, where the kernel reports it (Documentation/accounting/psi.rst).
pub fn pressure() -> Option<Pressure> {
    let share = |name: &str| some_avg10(&read(&format!("/proc/pressure/{name}")));
    let pressure = Pressure { cpu_percent: share("cpu"), memory_percent: share("memory"), io_percent: share("io") };
    (pressure != Pressure::default()).then_some(pressure)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn some_avg10(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with("some "))?;
    line.split(' ').find_map(|field| field.strip_prefix("avg10="))?.parse().ok()
}

fn ticks_per_second() -> f64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().map_or(100.0, |ticks| ticks as f64)
}

/// All but idle and waiting for disks, over all processors (proc(5)). Guest time is part of user time already.
fn busy_ticks(stat: &str) -> u64 {
    let Some(line) = stat.lines().find(|line| line.starts_with("cpu ")) else { return 0 };
    let fields: Vec<u64> = line.split_whitespace().skip(1).take(8).map(|field| field.parse().unwrap_or(0)).collect();
    fields.iter().enumerate().filter(|(index, _)| !matches!(index, 3 | 4)).map(|(_, ticks)| ticks).sum()
}

fn memory_used_mib(meminfo: &str) -> f64 {
    let kib = |name: &str| {
        let line = meminfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok()).unwrap_or(0.0)
    };
    (kib("MemTotal:") - kib("MemAvailable:")).max(0.0) / 1024.0
}

/// Bytes read from and written to whole disks; partitions, loop devices and device mapper would count them twice.
fn disk_bytes(diskstats: &str) -> u64 {
    let sectors = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let name = fields.get(2)?;
        let disk = std::path::Path::new("/sys/block").join(name).join("device").exists();
        let field = |index: usize| fields.get(index)?.parse::<u64>().ok();
        disk.then(|| Some(field(5)? + field(9)?))?
    };
    diskstats.lines().filter_map(sectors).sum::<u64>() * 512
}

/// Bytes through all interfaces but the loopback.
fn network_bytes(dev: &str) -> u64 {
    let bytes = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let fields: Vec<u64> = counters.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
        (name.trim() != "lo").then(|| Some(fields.first()? + fields.get(8)?))?
    };
    dev.lines().filter_map(bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_understood() {
        assert_eq!(busy_ticks("cpu  10 1 5 1000 50 2 3 4 9 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"), 25);
        assert_eq!(memory_used_mib("MemTotal: 2048 kB\nMemFree: 1 kB\nMemAvailable: 1024 kB\n"), 1.0);
        let dev = "Inter-|   Receive\n face |bytes\n    lo: 9 0 0 0 0 0 0 0 9 0\n  eth0: 100 1 0 0 0 0 0 0 23 1 0\n";
        assert_eq!(network_bytes(dev), 123);
        assert_eq!(some_avg10("some avg10=1.50 avg60=0.20 avg300=0.00 total=1\nfull avg10=0.1\n"), Some(1.5));
    }

    #[test]
    fn the_first_reading_is_no_rate() {
        let mut meter = HostMeter::default();
        assert!(meter.read().is_none());
        assert!(meter.read().unwrap().memory_mib > 0.0);
    }
}
