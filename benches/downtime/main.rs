//! Downtime, total time and start-up of real machines, beside QEMU and beside physical limits, all in one run.
//!
//! `downtime --scenario idle --peer qemu --json FILE`; see `--help`.

mod cpu;
mod fio;
mod latency;
mod limits;
mod link;
mod measure;
mod median;
mod ours;
mod plot;
mod qemu;
mod qmp;
mod result;
mod scenario;
mod session;
mod setting;
mod site;
mod startup;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};

use crate::limits::Limits;
use crate::link::Link;
use crate::result::{Everything, Outcome};
use crate::scenario::Scenario;
use crate::setting::Setting;

/// Measures live migration of a 1 GiB machine (512 MiB filled, one vCPU) between two hosts on this computer.
///
/// Each run starts both machines anew, waits until the guest has filled its memory, lets an outside observer send 1,000 echo
/// requests a second, and migrates. Needs root (network namespaces) and /dev/kvm.
#[derive(Debug, Parser)]
#[command(
    after_help = "Examples:\n  downtime --scenario idle --peer qemu --json idle.json\n  downtime --scenario all --peer qemu --report docs/benchmarks.md\n  downtime --scenario startup"
)]
struct Arguments {
    /// What to measure.
    #[arg(long, value_enum)]
    scenario: Choice,
    /// Runs on each side; the medians are compared.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    runs: u16,
    /// Memory channels: TLS sessions of ours, multifd connections of QEMU's [default: what each does by itself, 2 and 1]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=16))]
    streams: Option<u16>,
    /// Narrow the link between the hosts to so many MiB per second (tc tbf).
    #[arg(long, value_name = "MIB_S", value_parser = clap::value_parser!(u32).range(1..))]
    link: Option<u32>,
    /// Make the link longer by so many milliseconds in each direction (a relay of our own).
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..=1000))]
    delay: Option<u32>,
    /// Run the same guest on another VMM in the same run.
    #[arg(long, value_enum)]
    peer: Option<Peer>,
    /// Write the results as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the table as Markdown, and a picture of it beside it.
    #[arg(long)]
    report: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Peer {
    Qemu,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Choice {
    Idle,
    Dirty100,
    Dirty512,
    Postcopy,
    Disk,
    Mixed,
    /// An idle machine over one, two and four channels.
    Channels,
    /// Start of the process to the first guest instruction, and memory beyond guest RAM.
    Startup,
    /// All of them.
    All,
}

impl Choice {
    fn scenarios(self) -> Vec<Scenario> {
        match self {
            Self::Idle => vec![Scenario::Idle],
            Self::Dirty100 => vec![Scenario::Dirty100],
            Self::Dirty512 => vec![Scenario::Dirty512],
            Self::Postcopy => vec![Scenario::Postcopy],
            Self::Disk => vec![Scenario::Disk],
            Self::Mixed => vec![Scenario::Mixed],
            Self::Channels | Self::Startup => Vec::new(),
            Self::All => Scenario::ALL.to_vec(),
        }
    }

    fn channels(self) -> &'static [u16] {
        if matches!(self, Self::Channels | Self::All) { &[1, 2, 4] } else { &[] }
    }

    fn startup(self) -> bool {
        matches!(self, Self::Startup | Self::All)
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("downtime: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    hostd::lab::interrupt::install()?;
    if !std::path::Path::new("/dev/kvm").exists() {
        bail!("/dev/kvm is missing: load the module kvm_intel or kvm_amd, or run on a machine with virtualization");
    }
    let peer = arguments.peer.map(|Peer::Qemu| qemu::Qemu::version()).transpose()?;
    eprintln!("measuring limits of this machine ...");
    let limits = Limits::measure()?;
    let setting = Setting {
        link: Link { mib_per_second: arguments.link, delay_ms: arguments.delay },
        streams: arguments.streams,
    };
    let mut outcomes = Vec::new();
    for scenario in arguments.scenario.scenarios() {
        let peer = peer.as_deref().filter(|_| scenario.has_peer());
        outcomes.push(measure::scenario(scenario, arguments.runs, &setting, peer, &limits)?);
    }
    let mut channels = Vec::new();
    for &streams in arguments.scenario.channels() {
        let setting = Setting { streams: Some(streams), ..setting };
        channels.push(measure::scenario(Scenario::Idle, arguments.runs, &setting, None, &limits)?);
    }
    let startup = arguments.scenario.startup().then(|| startup::measure(arguments.runs)).transpose()?;
    let everything = Everything { scenarios: outcomes, channels, startup };
    print!("{}", result::table(&everything, &limits));
    if let Some(path) = &arguments.report {
        let picture = path.with_extension("svg");
        let name = picture.file_name().unwrap_or_default().to_string_lossy();
        std::fs::write(path, result::document(&everything, &limits, &name))
            .with_context(|| format!("write {}", path.display()))?;
        std::fs::write(&picture, result::picture(&everything.scenarios))
            .with_context(|| format!("write {}", picture.display()))?;
    }
    if let Some(path) = &arguments.json {
        let text = match everything.scenarios.as_slice() {
            [single] => serde_json::to_string_pretty(single)?,
            _ => serde_json::to_string_pretty(&everything)?,
        };
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    if everything.scenarios.iter().chain(&everything.channels).any(Outcome::broken) {
        bail!("a migration did not complete, or its digests differ: see the runs above");
    }
    Ok(())
}
