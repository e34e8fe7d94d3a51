//! Machines in words.

use vmm::api::BalloonInfo;

use super::output::{Table, bytes, duration, or_dash, word};
use crate::api::types::{DirtyRate, DirtyRateSource, Machine, Usage};
use crate::clock::utc;

pub(super) fn table(machines: &[Machine]) -> String {
    let mut table = Table::new(&["NAME", "STATUS", "VCPUS", "MEMORY", "CPU", "RESIDENT", "DISK/S", "NETWORK/S"]);
    for machine in machines {
        let usage = |show: fn(&Usage) -> String| or_dash(machine.usage.as_ref().map(show));
        table.row(vec![
            machine.name.clone(),
            word(machine.status),
            machine.vcpus.to_string(),
            format!("{} MiB", machine.memory_mib),
            usage(|usage| format!("{:.2}", usage.cpu_cores)),
            usage(|usage| format!("{:.0} MiB", usage.memory_mib)),
            usage(|usage| bytes(usage.disk_bytes_per_second)),
            usage(|usage| bytes(usage.network_bytes_per_second)),
        ]);
    }
    table.text("no machines on this host; `headroom machine create --help` shows how to make one")
}

pub(super) fn balloon(info: &BalloonInfo) -> String {
    let mut text = format!(
        "balloon   {} given back, {} asked for\nreported  {} as free since the machine came to this host, each time anew\n",
        bytes(info.actual_bytes as f64),
        bytes(info.target_bytes as f64),
        bytes(info.reported_bytes as f64),
    );
    let told = &info.statistics;
    let figures = [("total", told.total_bytes), ("free", told.free_bytes), ("available", told.available_bytes)];
    let figures: Vec<String> = figures
        .into_iter()
        .filter_map(|(what, figure)| figure.map(|figure| format!("{what} {}", bytes(figure as f64))))
        .collect();
    if !figures.is_empty() {
        text.push_str(&format!("guest     {}\n", figures.join(", ")));
    }
    text
}

pub(super) fn dirty_rate(name: &str, rate: &DirtyRate) -> String {
    let Some(value) = rate.bytes_per_second.map(bytes) else {
        return format!("{name}: a migration is under way and has measured no dirty rate yet\n");
    };
    match rate.source {
        DirtyRateSource::Stopped => return format!("{name} does not run, and dirties nothing\n"),
        DirtyRateSource::Migration => {
            let held = match rate.throttle_percent {
                0 => String::new(),
                percent => format!("; its vCPUs are held for up to {percent} % of their time, it would dirty more"),
            };
            return format!(
                "{name} dirties {value}/s with its disks, as the migration that is under way measured{held}\n"
            );
        }
        DirtyRateSource::Sampled => {}
    }
    let bound = |value: Option<f64>| or_dash(value.map(bytes));
    let after_ms = rate.looks.last().map_or(0.0, |look| look.after_ms);
    let mut text = format!(
        "{name} dirties {}{value}/s ({} to {} with 95 %; {} pages sampled for {})\n",
        if rate.lower_bound { "at least " } else { "" },
        bound(rate.low_bytes_per_second),
        bound(rate.high_bytes_per_second),
        rate.sampled_pages,
        duration(after_ms),
    );
    if rate.lower_bound {
        text.push_str(
            "nearly all of its memory was different: it may be faster by any factor, look for a shorter time\n",
        );
    }
    if let Some(set) = rate.working_set_bytes.map(bytes) {
        let peak = bound(rate.peak_bytes_per_second);
        text.push_str(&format!("it writes {set} again and again, and {peak}/s before it comes to the same pages\n"));
    }
    text
}

/// Why it is as it is, behind a colon.
pub(super) fn reason(machine: &Machine) -> String {
    machine.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default()
}

pub(super) fn details(machine: &Machine) -> String {
    let mut text = format!(
        "status    {}{}\nhost      {} (pool {})\nsize      {} vCPU, {} MiB\nkernel    {}\n",
        word(machine.status),
        reason(machine),
        machine.host,
        machine.pool,
        machine.vcpus,
        machine.memory_mib,
        String::from(machine.kernel.clone()),
    );
    if !machine.cmdline.is_empty() {
        text.push_str(&format!("cmdline   {}\n", machine.cmdline));
    }
    if machine.balloon {
        text.push_str("balloon   the guest gives free memory back\n");
    }
    for disk in &machine.disks {
        let shared = if disk.shared { ", shared" } else { "" };
        text.push_str(&format!("disk      {} {} {}{shared}\n", disk.id, bytes(disk.bytes as f64), disk.path.display()));
    }
    for network in &machine.networks {
        text.push_str(&format!("network   {} {} on {}\n", network.id, network.mac, network.tap));
    }
    if let Some(usage) = &machine.usage {
        text.push_str(&format!(
            "usage     {:.2} cores, {:.0} MiB, disk {}/s, network {}/s\n",
            usage.cpu_cores,
            usage.memory_mib,
            bytes(usage.disk_bytes_per_second),
            bytes(usage.network_bytes_per_second)
        ));
    }
    if let Some(migration) = &machine.migration {
        text.push_str(&format!("moved by  {migration}\n"));
    }
    text.push_str(&format!("created   {} UTC\n", utc(machine.created_unix_ms)));
    text.push_str(&format!("process   {}\n", or_dash(machine.pid.map(|pid| pid.to_string()))));
    text.push_str(&format!("console   {}\n", machine.console.display()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dirty_rate_reads_well() {
        let mib = |count: f64| Some(count * 1048576.0);
        let mut rate = DirtyRate {
            bytes_per_second: mib(48.0),
            low_bytes_per_second: mib(44.0),
            high_bytes_per_second: mib(52.5),
            sampled_pages: 2048,
            ..DirtyRate::default()
        };
        let text = dirty_rate("vm1", &rate);
        assert!(text.starts_with("vm1 dirties 48.0 MiB/s (44.0 MiB to 52.5 MiB with 95 %; 2048 pages"), "{text}");
        (rate.lower_bound, rate.working_set_bytes, rate.peak_bytes_per_second) = (true, mib(48.0), mib(100.0));
        let text = dirty_rate("vm1", &rate);
        assert!(
            text.contains("at least 48.0 MiB/s") && text.contains("writes 48.0 MiB again and again, and 100.0 MiB/s")
        );
        (rate.source, rate.throttle_percent) = (DirtyRateSource::Migration, 70);
        assert!(dirty_rate("vm1", &rate).contains("up to 70 %"));
        rate.bytes_per_second = None;
        assert!(dirty_rate("vm1", &rate).contains("no dirty rate yet"));
    }
}
