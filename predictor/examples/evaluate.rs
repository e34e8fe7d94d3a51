//! Forecasts replayed over recorded traces: the readers and the report of `headroom forecast evaluate`.
//!
//! `evaluate --cpu CSV --memory CSV [--pools JSON --pool-cpu CSV] [--test-from-day N] [--until-day N] [--json FILE]`
//!
//! CSVs are wide: a first column of Unix seconds, then one column a machine, an empty cell where nothing was measured; plain or gzip.

use anyhow::{Context, Result, bail};
use predictor::replay::pool::{Said, replay_pool};
use predictor::replay::summary::{MachineSummary, PoolSummary, machines, pools};
use predictor::replay::{Protocol, replay_machine};
use predictor::{Bank, BankConfig, bank::cycles};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The largest trace that is read, in cells: 500 machines for a year of five minutes.
const MOST_CELLS: usize = 60_000_000;

/// One recorded series.
type Series = Vec<Option<f64>>;

/// A wide CSV.
struct Table {
    period_s: f64,
    names: Vec<String>,
    columns: Vec<Series>,
}

fn read_table(path: &Path) -> Result<Table> {
    let mut file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut magic = [0; 2];
    let gzip = file.read_exact(&mut magic).is_ok() && magic == [0x1f, 0x8b];
    let file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let reader: Box<dyn BufRead> = if gzip {
        Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(file)))
    } else {
        Box::new(BufReader::new(file))
    };
    parse_table(reader).with_context(|| format!("cannot read {}", path.display()))
}

fn parse_table(reader: impl BufRead) -> Result<Table> {
    let mut lines = reader.lines();
    let header = lines.next().context("it is empty: a header with the machines' names is needed")??;
    let names: Vec<String> = header.split(',').skip(1).map(|name| name.trim().to_owned()).collect();
    if names.is_empty() {
        bail!("its header names no machine: expected `unix_seconds,<machine>,...`");
    }
    let mut columns: Vec<Series> = vec![Vec::new(); names.len()];
    let mut times = Vec::new();
    for (number, line) in lines.enumerate() {
        let line = line?;
        let mut cells = line.split(',');
        let time = cells.next().and_then(|cell| cell.trim().parse::<f64>().ok());
        let Some(time) = time.filter(|time| time.is_finite()) else {
            bail!("line {} does not start with a time in seconds", number + 2);
        };
        times.push(time);
        if times.len() * names.len() > MOST_CELLS {
            bail!("it has more than {MOST_CELLS} cells: split it");
        }
        for column in &mut columns {
            column.push(cells.next().and_then(|cell| cell.trim().parse::<f64>().ok()));
        }
        if cells.next().is_some() {
            bail!("line {} has more cells than the header", number + 2);
        }
    }
    let mut steps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    steps.sort_by(f64::total_cmp);
    let period_s = steps.get(steps.len() / 2).copied().unwrap_or(0.0);
    if period_s <= 0.0 {
        bail!("its times do not grow");
    }
    Ok(Table { period_s, names, columns })
}

#[derive(Deserialize)]
struct PoolsFile {
    pools: Vec<Vec<String>>,
}

#[derive(Serialize)]
struct CostSummary {
    /// One sample taken and three horizons with their quantiles read, in nanoseconds.
    ns_per_update_and_forecast: f64,
    /// State of one machine and resource in bytes.
    state_bytes: usize,
}

#[derive(Serialize)]
struct Report {
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<MachineSummary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<MachineSummary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pool: Option<PoolSummary>,
    cost: CostSummary,
    protocol: Protocol,
}

fn bank_config(period_s: f64, protocol: &Protocol) -> BankConfig {
    BankConfig { horizons: protocol.horizons.clone(), seasons: cycles(period_s), ..BankConfig::default() }
}

fn evaluate_machines(path: &Path, protocol: &Protocol) -> Result<MachineSummary> {
    let table = read_table(path)?;
    let config = bank_config(table.period_s, protocol);
    let mut scores = Vec::new();
    for column in &table.columns {
        scores.extend(replay_machine(column, protocol, &config)?);
    }
    Ok(machines(&scores, protocol, table.period_s))
}

fn evaluate_pools(members: &Path, path: &Path, protocol: &Protocol) -> Result<PoolSummary> {
    let table = read_table(path)?;
    let text = std::fs::read_to_string(members).with_context(|| format!("cannot read {}", members.display()))?;
    let file: PoolsFile = serde_json::from_str(&text)
        .with_context(|| format!("{}: expected {{\"pools\": [[machine, ...], ...]}}", members.display()))?;
    let places: HashMap<&str, usize> = table.names.iter().enumerate().map(|(i, name)| (name.as_str(), i)).collect();
    let config = bank_config(table.period_s, protocol);
    let mut said: Vec<Vec<Said>> = vec![Vec::new(); protocol.horizons.len()];
    for pool in &file.pools {
        let columns: Vec<&Series> =
            pool.iter().filter_map(|name| places.get(name.as_str())).map(|place| &table.columns[*place]).collect();
        for (all, one) in said.iter_mut().zip(replay_pool(&sum(&columns), protocol, &config)?) {
            all.extend(one);
        }
    }
    Ok(pools(&said, protocol, table.period_s))
}

/// The sum of machines, a gap bridged by the value before it.
fn sum(columns: &[&Series]) -> Series {
    let mut last = vec![None; columns.len()];
    let steps = columns.first().map_or(0, |column| column.len());
    (0..steps)
        .map(|t| {
            for (last, column) in last.iter_mut().zip(columns) {
                *last = column[t].or(*last);
            }
            last.iter().flatten().copied().reduce(|a, b| a + b)
        })
        .collect()
}

/// Time that this thread has run in nanoseconds, so that other work on the machine is not counted; wall time if the kernel does
/// not say.
fn run_time_ns(since: Instant) -> u64 {
    let said = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let said = said.and_then(|text| text.split_whitespace().next()?.parse().ok());
    said.unwrap_or_else(|| since.elapsed().as_nanos() as u64)
}

fn measure_cost(config: &BankConfig) -> Result<CostSummary> {
    const BANKS: usize = 1_000;
    let (warm, rounds) = (1_000, 2 * config.refit_every as usize);
    let mut banks = (0..BANKS).map(|_| Bank::new(config.clone())).collect::<Result<Vec<_>, _>>()?;
    let since = Instant::now();
    let mut state = 1_u64;
    let mut start = 0;
    let mut kept = 0.0;
    for round in 0..warm + rounds {
        // In the long run, that is with solutions of the regression at their usual distance.
        if round == warm {
            start = run_time_ns(since);
        }
        for bank in &mut banks {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            bank.update(Some(50.0 + (state >> 40) as f64 / 1e6));
            for steps in &config.horizons {
                kept += bank.forecast(*steps).map_or(0.0, |forecast| forecast.quantiles[3]);
            }
        }
    }
    let spent = run_time_ns(since).saturating_sub(start) as f64;
    std::hint::black_box(kept);
    let ns_per_update_and_forecast = spent / (BANKS * rounds) as f64;
    Ok(CostSummary { ns_per_update_and_forecast, state_bytes: banks[0].state_bytes() })
}

fn main() -> Result<()> {
    let mut options: HashMap<String, String> = HashMap::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let Some(name) = name.strip_prefix("--") else { bail!("unexpected argument {name:?}") };
        let value = arguments.next().with_context(|| format!("--{name} needs a value"))?;
        options.insert(name.to_owned(), value);
    }
    let path = |name: &str| options.get(name).map(PathBuf::from);
    let mut protocol = Protocol::five_minutes();
    if let Some(day) = options.get("test-from-day") {
        let day: usize = day.parse().context("--test-from-day needs a number")?;
        protocol.test_from = day * protocol.day;
        protocol.calibrate_from = protocol.test_from.saturating_sub(14 * protocol.day);
    }
    if let Some(day) = options.get("until-day") {
        protocol.test_until = day.parse::<usize>().context("--until-day needs a number")? * protocol.day;
    }
    let report = Report {
        cpu: path("cpu").map(|cpu| evaluate_machines(&cpu, &protocol)).transpose()?,
        memory: path("memory").map(|memory| evaluate_machines(&memory, &protocol)).transpose()?,
        pool: match (path("pools"), path("pool-cpu")) {
            (Some(members), Some(cpu)) => Some(evaluate_pools(&members, &cpu, &protocol)?),
            (None, None) => None,
            _ => bail!("--pools and --pool-cpu belong together"),
        },
        cost: measure_cost(&bank_config(300.0, &protocol))?,
        protocol,
    };
    let text = serde_json::to_string_pretty(&report)?;
    match path("json") {
        Some(file) => std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display())),
        None => {
            println!("{text}");
            Ok(())
        }
    }
}
