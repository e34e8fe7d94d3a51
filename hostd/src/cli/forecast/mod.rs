//! `headroom forecast`: what is forecast now, and how good the forecasts would have been on a recorded trace.

mod bitbrains;
pub(super) mod plot;
mod report;
pub(super) mod trace;

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, Subcommand};
use predictor::evaluate::{
    bank_config, evaluate_machines, evaluate_panels, evaluate_pool_panels, evaluate_pools, measure_cost,
};
use predictor::replay::Protocol;

use super::output::Output;
use super::{Failure, view};
use crate::client::Client;
use report::{Panels, Report};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Replay a recorded trace and score the forecasts beside simple ones. Needs no hostd.
    Evaluate(Evaluate),
}

/// Which trace, and where the report goes.
#[derive(Debug, Args)]
#[command(after_help = "\
Traces are wide CSVs, plain or gzip: a first column of seconds, then one column a machine, an empty cell where nothing was
measured. A list of pools is {\"pools\": [[\"machine\", ...], ...]}; their CPU has to be in a unit that can be summed.

Examples:
  headroom forecast evaluate --cpu cpu.csv.gz --memory memory.csv.gz --json report.json --svg report.svg
  headroom forecast evaluate --pools pools.json --pool-cpu cpu-mhz.csv
  headroom forecast evaluate --bitbrains rnd/2013-7 --test-from-day 20")]
pub(super) struct Evaluate {
    /// CPU of the machines.
    #[arg(long, value_name = "CSV")]
    cpu: Option<PathBuf>,
    /// Memory of the machines.
    #[arg(long, value_name = "CSV")]
    memory: Option<PathBuf>,
    /// A folder in Bitbrains' own format, one file a machine, instead of CSVs.
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["cpu", "memory", "pool_cpu"])]
    bitbrains: Option<PathBuf>,
    /// Pools and their machines.
    #[arg(long, value_name = "JSON")]
    pools: Option<PathBuf>,
    /// CPU of the pools' machines.
    #[arg(long, value_name = "CSV", requires = "pools")]
    pool_cpu: Option<PathBuf>,
    /// Minutes ahead; each is rounded to whole samples.
    #[arg(long, value_name = "MINUTES", value_delimiter = ',', default_value = "5,15,60")]
    horizons: Vec<f64>,
    /// Day from which forecasts are scored [default: 46, or the middle of a shorter trace].
    #[arg(long, value_name = "DAY")]
    test_from_day: Option<f64>,
    /// Day at which the trace is cut off.
    #[arg(long, value_name = "DAY")]
    until_day: Option<f64>,
    /// Give so many machines of each trace, and pools, a panel of dear models, and compare these with bank and trees only.
    #[arg(long, value_name = "MACHINES", conflicts_with = "svg")]
    panels: Option<usize>,
    /// Write plots.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Where --json writes the report; without it, JSON goes to standard output.
    #[arg(value_name = "FILE", requires = "json")]
    report: Option<PathBuf>,
}

pub(super) async fn run(client: &Client, output: &Output, command: Option<Command>) -> Result<(), Failure> {
    match command {
        None => view::forecasts(client, output).await,
        Some(Command::Evaluate(arguments)) => evaluate(output, &arguments),
    }
}

/// What is evaluated.
#[derive(Default)]
struct Traces {
    cpu: Option<predictor::evaluate::Trace>,
    memory: Option<predictor::evaluate::Trace>,
    pools: Option<(Vec<Vec<String>>, predictor::evaluate::Trace)>,
}

impl Traces {
    fn read(arguments: &Evaluate) -> Result<Self, Failure> {
        let lists = arguments.pools.as_deref().map(trace::pools).transpose()?;
        if let Some(folder) = &arguments.bitbrains {
            let machines = bitbrains::folder(folder)?;
            let pools = lists.map(|lists| (lists, machines.cpu_mhz));
            return Ok(Self { cpu: Some(machines.cpu), memory: Some(machines.memory), pools });
        }
        let pools = match (lists, &arguments.pool_cpu) {
            (Some(lists), Some(cpu)) => Some((lists, trace::wide(cpu)?)),
            (Some(_), None) => return Err(Failure::Other("--pools needs --pool-cpu (or --bitbrains)".to_owned())),
            (None, _) => None,
        };
        let read = |path: &Option<PathBuf>| path.as_deref().map(trace::wide).transpose();
        let all = Self { cpu: read(&arguments.cpu)?, memory: read(&arguments.memory)?, pools };
        if all.all().next().is_none() {
            return Err(Failure::Other(
                "give a trace: --cpu, --memory, --pools with --pool-cpu, or --bitbrains".into(),
            ));
        }
        Ok(all)
    }

    fn all(&self) -> impl Iterator<Item = &predictor::evaluate::Trace> {
        self.cpu.iter().chain(&self.memory).chain(self.pools.iter().map(|(_, trace)| trace))
    }

    fn cut(&mut self, day: f64) {
        let pools = self.pools.iter_mut().map(|(_, trace)| trace);
        for trace in self.cpu.iter_mut().chain(&mut self.memory).chain(pools) {
            let steps = (day.max(0.0) * 86_400.0 / trace.period_s).round() as usize;
            trace.columns.iter_mut().for_each(|column| column.truncate(steps));
        }
    }
}

fn evaluate(output: &Output, arguments: &Evaluate) -> Result<(), Failure> {
    let mut traces = Traces::read(arguments)?;
    if let Some(day) = arguments.until_day {
        traces.cut(day);
    }
    let told = |what: &str| {
        let what = what.to_owned();
        move |error: predictor::evaluate::EvaluateError| Failure::Other(format!("{what}: {error}"))
    };
    let protocol = |trace: &predictor::evaluate::Trace| {
        Protocol::new(trace.period_s, trace.steps(), &arguments.horizons, arguments.test_from_day)
    };
    if let Some(count) = arguments.panels {
        let of = |name: &str, trace: &Option<predictor::evaluate::Trace>| {
            trace.as_ref().map(|trace| evaluate_panels(trace, &protocol(trace), count).map_err(told(name))).transpose()
        };
        let pool = |(lists, trace): &(Vec<Vec<String>>, predictor::evaluate::Trace)| {
            evaluate_pool_panels(trace, lists, &protocol(trace), count).map_err(told("pools"))
        };
        let report = Panels {
            cpu: of("cpu", &traces.cpu)?,
            memory: of("memory", &traces.memory)?,
            pool: traces.pools.as_ref().map(pool).transpose()?,
            networks: predictor::model::lstm::Lstm::CAN_BE_FITTED,
        };
        return write_report(output, arguments, &report, report::panels);
    }
    let Some(first) = traces.all().next() else { return Ok(()) };
    let shared = protocol(first);
    let config = bank_config(first.period_s, &shared);
    let machines = |name: &str, trace: &Option<predictor::evaluate::Trace>| {
        trace.as_ref().map(|trace| evaluate_machines(trace, &protocol(trace)).map_err(told(name))).transpose()
    };
    let pool = |(lists, trace): &(Vec<Vec<String>>, predictor::evaluate::Trace)| {
        evaluate_pools(trace, lists, &protocol(trace)).map_err(told("pools"))
    };
    let report = Report {
        cpu: machines("cpu", &traces.cpu)?,
        memory: machines("memory", &traces.memory)?,
        pool: traces.pools.as_ref().map(pool).transpose()?,
        cost: cost(&config)?,
        protocol: shared,
    };
    if let Some(path) = &arguments.svg {
        std::fs::write(path, plot::svg(&report)).map_err(|error| trace::wrong(path, &error))?;
    }
    write_report(output, arguments, &report, report::text)
}

fn cost(config: &predictor::BankConfig) -> Result<predictor::evaluate::Cost, Failure> {
    let since = Instant::now();
    measure_cost(config, || run_time_ns(since)).map_err(|error| Failure::other(&error))
}

/// Time that this thread has run in nanoseconds, so that other work on the machine is not counted; wall time if the kernel does
/// not say.
fn run_time_ns(since: Instant) -> u64 {
    let said = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let said = said.and_then(|text| text.split_whitespace().next()?.parse().ok());
    said.unwrap_or_else(|| since.elapsed().as_nanos() as u64)
}

fn write_report<T: serde::Serialize>(
    output: &Output,
    arguments: &Evaluate,
    report: &T,
    text: fn(&T) -> String,
) -> Result<(), Failure> {
    let Some(path) = &arguments.report else { return Ok(output.print(report, text)?) };
    let json = serde_json::to_string_pretty(report).map_err(|error| Failure::other(&error))?;
    std::fs::write(path, json + "\n").map_err(|error| trace::wrong(path, &error))?;
    Ok(Output::new(false).print(report, text)?)
}

#[cfg(test)]
mod tests;
