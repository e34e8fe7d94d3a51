//! What forecasts cost and, where a recorded trace is given, how good they are: one JSON for both.
//!
//! `forecast --json FILE`; see `--help`. The trace is not in this repository: `--data FOLDER`, or `HEADROOM_TRACE=FOLDER`, names a
//! folder with `cpu_percent.csv.gz`, `memory_percent.csv.gz`, `pool_cpu_mhz.csv.gz` and `pools.json`, and the protocol of `headroom
//! forecast evaluate` is run on it by the `headroom` beside this program.

mod cost;
mod report;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::Serialize;

use crate::cost::{Bank, Models, Tick};

/// Measures the cost of forecasts on generated data, and their quality on a recorded trace.
#[derive(Debug, Parser)]
struct Arguments {
    /// Folder with a recorded trace; without it, quality is not measured.
    #[arg(long, env = "HEADROOM_TRACE", value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// Machines of a tick.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=100_000))]
    machines: u32,
    /// Write the results as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the results as Markdown.
    #[arg(long)]
    report: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Outcome {
    /// Load of this computer over the last minute when the measurement began, without which no time means anything.
    load: f64,
    /// Processor, number of cores, kernel.
    machine: String,
    bank: Bank,
    tick: Tick,
    models: Models,
    limits: Limits,
    #[serde(skip_serializing_if = "Option::is_none")]
    evaluate: Option<serde_json::Value>,
}

/// What was asked for.
#[derive(Debug, Serialize)]
struct Limits {
    bank_ns: f64,
    bank_bytes: usize,
    tick_ms: f64,
}

const LIMITS: Limits = Limits { bank_ns: 1_000.0, bank_bytes: 4_096, tick_ms: 50.0 };

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("forecast: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let load = load()?;
    let outcome = Outcome {
        load,
        machine: machine(),
        bank: cost::bank()?,
        tick: cost::tick(arguments.machines as usize)?,
        models: cost::models()?,
        limits: LIMITS,
        evaluate: arguments.data.as_deref().map(evaluate).transpose()?,
    };
    print(&outcome);
    let write = |path: &Path, text: String| {
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    if let Some(path) = &arguments.json {
        write(path, serde_json::to_string_pretty(&outcome)? + "\n")?;
    }
    if let Some(path) = &arguments.report {
        write(path, report::markdown(&outcome))?;
    }
    Ok(())
}

/// What this computer is, as far as it says so.
fn machine() -> String {
    let told = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let about = told("/proc/cpuinfo");
    let model = about.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("processor unknown", |(_, name)| name.trim());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{cores} cores, {model}, Linux {}", told("/proc/sys/kernel/osrelease").trim())
}

fn load() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").context("cannot read the load of this computer")?;
    text.split_whitespace().next().and_then(|load| load.parse().ok()).context("/proc/loadavg has no number")
}

fn print(outcome: &Outcome) {
    let Outcome { load, bank, tick, models, .. } = outcome;
    println!("load of this computer at the start: {load}; times are those of this thread");
    println!(
        "bank       {:.0} ns an update with three horizons read, {} bytes (limits {:.0} ns, {} bytes)",
        bank.ns_per_update_and_forecast, bank.state_bytes, LIMITS.bank_ns, LIMITS.bank_bytes
    );
    println!(
        "a tick of {} machines x {} resources in {} pools (limit {:.0} ms):",
        tick.machines, tick.resources, tick.pools, LIMITS.tick_ms
    );
    for (name, times) in tick.stages() {
        println!(
            "  {name:<32} median {:>6.1} ms, p99 {:>6.1} ms, slowest {:>6.1} ms of {}",
            times.median_ms, times.p99_ms, times.slowest_ms, times.ticks
        );
    }
    for model in &models.fits {
        println!("fit        {:<10} {:>9.2} ms, {} bytes", model.name, model.ms, model.state_bytes);
    }
    println!("trees      {:.0} ns for one quantile of one machine", models.trees_ns);
}

/// Runs the protocol of `headroom forecast evaluate` on a folder.
fn evaluate(folder: &Path) -> Result<serde_json::Value> {
    let own = std::env::current_exe().context("cannot tell where this program lies")?;
    let headroom = own.with_file_name("headroom");
    if !headroom.exists() {
        bail!("{} is missing: build it with `cargo build --release -p hostd --bin headroom`", headroom.display());
    }
    let report = std::env::temp_dir().join(format!("headroom-forecast-{}.json", std::process::id()));
    let mut command = Command::new(&headroom);
    command.args(["forecast", "evaluate"]);
    for (flag, name) in [
        ("--cpu", "cpu_percent.csv.gz"),
        ("--memory", "memory_percent.csv.gz"),
        ("--pools", "pools.json"),
        ("--pool-cpu", "pool_cpu_mhz.csv.gz"),
    ] {
        command.arg(flag).arg(folder.join(name));
    }
    let status = command.arg("--json").arg(&report).status().with_context(|| format!("{}", headroom.display()))?;
    if !status.success() {
        bail!("`headroom forecast evaluate` failed ({status}): see above");
    }
    let text = std::fs::read_to_string(&report).with_context(|| format!("cannot read {}", report.display()))?;
    std::fs::remove_file(&report).ok();
    serde_json::from_str(&text).context("the report is not JSON")
}
