//! `headroom plan`: what the planner decided, and what it would have decided on a recorded trace.

mod report;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::{Args, Subcommand};
use predictor::MigrationShape;
use predictor::simulate::Scenario;
use predictor::simulate::compare::{Comparison, Outcomes, Settings, join, outcomes, runs, scenarios};
use predictor::simulate::inject::Injection;

use super::output::Output;
use super::{Failure, forecast, view};
use crate::client::Client;
use report::Report;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Arguments {
    #[command(flatten)]
    show: view::PlanArguments,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Replay a recorded trace through the whole decision loop, beside reactive thresholds and one who knows the future. Needs
    /// no hostd.
    Simulate(Simulate),
}

/// Which trace, what is put into it, and where the report goes.
#[derive(Debug, Args)]
#[command(after_help = "\
Pools may send machines to each other within groups (--together), as they are listed; a machine that is in several pools of a group
counts in the first. The predictor is run with several minima of what a move has to avoid; what counts is the comparison at equal
numbers of migrations at the end.

Examples:
  headroom plan simulate --pools pools.json --pool-cpu cpu-mhz.csv.gz --json report.json --svg report.svg
  headroom plan simulate --pools pools.json --pool-cpu cpu-mhz.csv.gz --groups 2 --events-per-day 0
  headroom plan simulate --pools pools.json --pool-cpu cpu-mhz.csv.gz --together 2")]
struct Simulate {
    /// Pools and their machines: {\"pools\": [[\"machine\", ...], ...]}.
    #[arg(long, value_name = "JSON")]
    pools: PathBuf,
    /// CPU of the machines, in a unit that can be summed.
    #[arg(long, value_name = "CSV")]
    pool_cpu: PathBuf,
    /// So many pools may send machines to each other.
    #[arg(long, value_name = "POOLS", default_value_t = 6, value_parser = clap::value_parser!(u16).range(2..=1_000))]
    together: u16,
    /// At most so many such groups.
    #[arg(long, default_value_t = usize::MAX, hide_default_value = true)]
    groups: usize,
    /// Day from which minutes are counted [default: the middle of the trace].
    #[arg(long, value_name = "DAY")]
    test_from_day: Option<f64>,
    /// Day at which the trace is cut off.
    #[arg(long, value_name = "DAY")]
    until_day: Option<f64>,
    /// How far to look ahead, in minutes.
    #[arg(long, value_name = "MINUTES", default_value_t = 60.0)]
    horizon: f64,
    /// Events put in, a day and pool; 0 for the trace as it is.
    #[arg(long, default_value_t = Injection::default().per_day)]
    events_per_day: f64,
    /// What an event adds, as a share of its pool's capacity.
    #[arg(long, default_value_t = Injection::default().share)]
    event_share: f64,
    /// The same number gives the same events.
    #[arg(long, default_value_t = Injection::default().seed)]
    seed: u64,
    /// Memory that a migration has to carry, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 4096.0)]
    machine_memory: f64,
    /// What a migration may use, in MiB per second.
    #[arg(long, value_name = "MIB/S", default_value_t = 500.0)]
    bandwidth: f64,
    /// Write a plot.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Where --json writes the report; without it, JSON goes to standard output.
    #[arg(value_name = "FILE", requires = "json")]
    report: Option<PathBuf>,
}

pub(super) async fn run(client: &Client, output: &Output, arguments: Arguments) -> Result<(), Failure> {
    match arguments.command {
        None => view::plans(client, output, &arguments.show).await,
        Some(Command::Simulate(arguments)) => simulate(output, &arguments),
    }
}

const MIB: f64 = 1_048_576.0;
/// Days in which policies only learn.
const WARM_DAYS: f64 = 10.0;

impl Simulate {
    fn settings(&self, period_s: f64, steps: usize) -> Settings {
        let of = |seconds: f64| (seconds / period_s).round().max(1.0) as usize;
        Settings {
            together: usize::from(self.together),
            horizon: of(60.0 * self.horizon),
            warm: of(WARM_DAYS * 86_400.0),
            from: self.test_from_day.map_or(steps / 2, |day| of(day * 86_400.0)),
            capacity_quantile: 0.975,
            injection: (self.events_per_day > 0.0).then(|| Injection {
                per_day: self.events_per_day,
                share: self.event_share,
                seed: self.seed,
                ..Injection::default()
            }),
            shape: MigrationShape {
                memory_bytes: self.machine_memory * MIB,
                dirty_bytes_per_second: 0.1 * self.bandwidth * MIB,
                bandwidth_bytes_per_second: self.bandwidth * MIB,
                downtime_limit_ms: 50.0,
                ..MigrationShape::default()
            },
        }
    }
}

fn simulate(output: &Output, arguments: &Simulate) -> Result<(), Failure> {
    let mut pools = forecast::trace::pools(&arguments.pools)?;
    pools.truncate(arguments.groups.saturating_mul(usize::from(arguments.together)));
    let mut trace = forecast::trace::wide(&arguments.pool_cpu)?;
    if let Some(day) = arguments.until_day {
        let steps = (day.max(0.0) * 86_400.0 / trace.period_s).round() as usize;
        trace.columns.iter_mut().for_each(|column| column.truncate(steps));
    }
    let settings = arguments.settings(trace.period_s, trace.steps());
    let scenarios = scenarios(&trace, &pools, &settings).map_err(|error| Failure::other(&error))?;
    if scenarios.is_empty() {
        return Err(Failure::Other(
            "in no group have all pools machines and load of their own: list at least two, or put fewer together"
                .to_owned(),
        ));
    }
    let comparison = compare(&scenarios, &settings)?;
    let report = Report { comparison, settings, period_s: trace.period_s };
    if let Some(path) = &arguments.svg {
        std::fs::write(path, report::svg(&report)).map_err(|error| forecast::trace::wrong(path, &error))?;
    }
    let Some(path) = &arguments.report else { return Ok(output.print(&report, report::text)?) };
    let text = serde_json::to_string_pretty(&report).map_err(|error| Failure::other(&error))?;
    std::fs::write(path, text + "\n").map_err(|error| forecast::trace::wrong(path, &error))?;
    Ok(Output::new(false).print(&report, report::text)?)
}

/// All policies over all scenarios, as many at a time as there are processors; the result does not depend on how many.
fn compare(scenarios: &[Scenario<'_>], settings: &Settings) -> Result<Comparison, Failure> {
    let with_events = settings.injection.is_some();
    let total = runs(scenarios.len(), with_events);
    let (next, over) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let told = || {
        let over = over.fetch_add(1, Ordering::Relaxed) + 1;
        if std::io::stderr().is_terminal() {
            eprint!("\r{over} of {total} runs\x1b[K{}", if over == total { "\n" } else { "" });
            _ = std::io::stderr().flush();
        }
    };
    let found: Mutex<Vec<Option<Result<Outcomes, predictor::BankError>>>> =
        Mutex::new(scenarios.iter().map(|_| None).collect());
    let work = || {
        while let Some((place, scenario)) = {
            let place = next.fetch_add(1, Ordering::Relaxed);
            scenarios.get(place).map(|scenario| (place, scenario))
        } {
            let outcome = outcomes(scenario, settings.horizon, with_events, told);
            if let Some(slot) = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_mut(place) {
                *slot = Some(outcome);
            }
        }
    };
    std::thread::scope(|scope| {
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(scenarios.len());
        (0..workers).for_each(|_| _ = scope.spawn(work));
    });
    let found = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let found: Result<Vec<Outcomes>, _> = found.into_iter().flatten().collect();
    Ok(join(&found.map_err(|error| Failure::other(&error))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[arg(long, global = true)]
        json: bool,
        #[command(flatten)]
        arguments: Arguments,
    }

    #[test]
    fn a_trace_becomes_a_comparison_at_equal_moves() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let mut csv = "t,a,b,c,d\n".to_owned();
        for t in 0..4 * 48 {
            let jitter = f64::from(t * 7919 % 101) / 100.0;
            csv.push_str(&format!("{},{},{},{},{}\n", 1800 * t, 3.0 + jitter, 2.0 - jitter / 2.0, 1.0 + jitter, 2.0));
        }
        std::fs::write(path("cpu.csv"), csv).unwrap();
        std::fs::write(path("pools.json"), r#"{"pools": [["a", "b"], ["c", "d"]]}"#).unwrap();
        let line = Line::parse_from([
            "plan",
            "simulate",
            "--pools",
            &path("pools.json"),
            "--pool-cpu",
            &path("cpu.csv"),
            "--svg",
            &path("plot.svg"),
            "--json",
            &path("report.json"),
        ]);
        let Some(Command::Simulate(arguments)) = line.arguments.command else { panic!("it is a simulation") };
        simulate(&Output::new(line.json), &arguments).unwrap();
        let report: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path("report.json")).unwrap()).unwrap();
        assert_eq!(report["groups"], 1);
        let none = &report["points"][0]["outcome"];
        let minutes =
            none["causes"].as_array().unwrap().iter().filter_map(|cause| cause["minutes"].as_f64()).sum::<f64>();
        assert_eq!(none["violation_minutes"], minutes, "every minute has a cause: {none}");
        assert_eq!(report["events"], 4, "two days of two pools: {report}");
        let names: Vec<&str> =
            report["points"].as_array().unwrap().iter().filter_map(|p| p["policy"].as_str()).collect();
        assert!(["none", "reactive", "oracle", "predictor"].iter().all(|name| names.contains(name)), "{names:?}");
        assert!(report["equal"][0]["ratio"].is_number());
        let plot = std::fs::read_to_string(path("plot.svg")).unwrap();
        assert!(plot.starts_with("<svg") && plot.contains("reactive"));
    }

    #[test]
    fn plans_are_shown_as_before_and_bad_traces_are_named() {
        let line = Line::parse_from(["plan", "--limit", "3"]);
        assert!(line.arguments.command.is_none() && !line.json);
        let line = Line::parse_from(["plan", "simulate", "--pools", "/none.json", "--pool-cpu", "/none.csv"]);
        let Some(Command::Simulate(arguments)) = line.arguments.command else { panic!("it is a simulation") };
        assert!(simulate(&Output::new(false), &arguments).unwrap_err().to_string().contains("/none.json"));
    }
}
