//! How long a machine takes to its first instruction, and what its process needs beyond guest RAM.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::measure::kernel;
use crate::ours::Vmm;
use crate::result::median;
use crate::scenario::Scenario;
use crate::site;

/// Medians over the runs.
#[derive(Clone, Debug, Serialize)]
pub struct Startup {
    /// From the start of the process to the first entry of a vCPU, in milliseconds.
    pub first_instruction_ms: f64,
    /// Resident memory of the process beyond guest RAM, in MiB, one second after the start with network and disk.
    pub overhead_mib: f64,
    /// The single runs: first instruction in ms, overhead in MiB.
    pub runs: Vec<(f64, f64)>,
}

/// Starts so many machines, one after the other.
pub fn measure(runs: u16) -> Result<Startup> {
    let mut results = Vec::new();
    for run in 1..=runs {
        eprintln!("startup run {run} of {runs} ...");
        let lab = site::build()?;
        let vmm = Vmm::start(lab.host("host1")?, Scenario::Disk, Some(kernel(&lab)?))?;
        std::thread::sleep(Duration::from_secs(1));
        let first = vmm.info()?.first_instruction_us.context("headroom-vmm did not measure its first instruction")?;
        let overhead = vmm.metrics()?.overhead_bytes;
        results.push((first as f64 / 1e3, overhead as f64 / f64::from(1 << 20)));
    }
    Ok(Startup {
        first_instruction_ms: median(results.iter().map(|run| run.0)),
        overhead_mib: median(results.iter().map(|run| run.1)),
        runs: results,
    })
}
