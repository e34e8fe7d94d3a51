//! Processor time that a host spends on a migration: all threads of its VMM but the vCPUs.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use serde::Serialize;

/// Processor time in milliseconds, from before the migration was asked for until it was over at both ends.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct HostCpu {
    /// At the source.
    pub source_ms: f64,
    /// At the destination, without what its vCPUs did after the resume.
    pub destination_ms: f64,
}

impl std::fmt::Display for HostCpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "processor {:.0} + {:.0} ms", self.source_ms, self.destination_ms)
    }
}

/// Processes whose time is taken at two moments.
pub struct Watch {
    processes: [(u32, Duration); 2],
}

impl Watch {
    /// Begins, with the processes of source and destination.
    pub fn start(source: u32, destination: u32) -> Result<Self> {
        Ok(Self { processes: [(source, spent(source)?), (destination, spent(destination)?)] })
    }

    /// What was spent since.
    pub fn stop(&self) -> Result<HostCpu> {
        let since = |(pid, before): (u32, Duration)| -> Result<f64> {
            Ok(spent(pid)?.saturating_sub(before).as_secs_f64() * 1e3)
        };
        Ok(HostCpu { source_ms: since(self.processes[0])?, destination_ms: since(self.processes[1])? })
    }
}

/// The whole process, threads that have ended included, less the vCPU threads that live.
fn spent(pid: u32) -> Result<Duration> {
    let clock: ClockId = clock_getcpuclockid(Pid::from_raw(pid.cast_signed()))?;
    let all = Duration::from(clock.now()?);
    let mut vcpus = Duration::ZERO;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = task?.path();
        // A thread may end between the listing and here.
        let (Ok(name), Ok(times)) = (fs::read_to_string(path.join("comm")), fs::read_to_string(path.join("schedstat")))
        else {
            continue;
        };
        if is_vcpu(name.trim()) {
            let nanoseconds = times.split(' ').next().and_then(|field| field.parse().ok());
            vcpus += Duration::from_nanos(nanoseconds.context("schedstat of a thread")?);
        }
    }
    Ok(all.saturating_sub(vcpus))
}

/// Ours are `vcpu0`, QEMU's `CPU 0/KVM`.
fn is_vcpu(name: &str) -> bool {
    name.starts_with("vcpu") || (name.starts_with("CPU ") && name.ends_with("/KVM"))
}
