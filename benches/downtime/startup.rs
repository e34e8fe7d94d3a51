//! How long a machine takes to its first instruction, and what its process needs beyond guest RAM.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::median::median;
use crate::ours::{self, Vmm};
use crate::scenario::Scenario;
use crate::setting::{Setting, kernel};
use crate::site;

/// Medians over the runs.
#[derive(Clone, Debug, Serialize)]
pub struct Startup {
    /// From the start of the process to the first entry of a vCPU, in milliseconds.
    pub first_instruction_ms: f64,
    /// Resident memory of the process beyond guest RAM, in MiB, one second after the start with network and disk.
    pub overhead_mib: f64,
    /// The same at a host to which the machine was migrated, after it was verified, in MiB.
    pub overhead_after_arrival_mib: f64,
    /// The single runs.
    pub runs: Vec<Run>,
}

/// One run, in the same units.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    first_instruction_ms: f64,
    overhead_mib: f64,
    overhead_after_arrival_mib: f64,
}

/// Starts so many machines, one after the other.
pub fn measure(runs: u16) -> Result<Startup> {
    let mut results = Vec::new();
    for run in 1..=runs {
        eprintln!("startup run {run} of {runs} ...");
        let lab = site::build()?;
        let (a, b) = (lab.host("host1")?, lab.host("host2")?);
        let vmm = Vmm::start(a, Scenario::Disk, Some(kernel(&lab)?))?;
        std::thread::sleep(Duration::from_secs(1));
        let first = vmm.info()?.first_instruction_us.context("headroom-vmm did not measure its first instruction")?;
        let overhead = vmm.metrics()?.overhead_bytes;
        let destination = Vmm::start(b, Scenario::Disk, None)?;
        ours::migrate((a, &vmm), (b, &destination), &Setting::default(), Scenario::Disk.mode())?;
        let arrived = destination.metrics()?.overhead_bytes;
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        results.push(Run {
            first_instruction_ms: first as f64 / 1e3,
            overhead_mib: mib(overhead),
            overhead_after_arrival_mib: mib(arrived),
        });
    }
    Ok(Startup {
        first_instruction_ms: median(results.iter().map(|run| run.first_instruction_ms)),
        overhead_mib: median(results.iter().map(|run| run.overhead_mib)),
        overhead_after_arrival_mib: median(results.iter().map(|run| run.overhead_after_arrival_mib)),
        runs: results,
    })
}
