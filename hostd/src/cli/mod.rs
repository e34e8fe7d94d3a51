//! `headroom`, the command line of an operator.
//!
//! Exit codes: 0 done; 1 refused or failed, and the message says why; 2 wrong arguments; 3 hostd cannot be reached; 4 a
//! migration that was waited for did not complete; 5 it did, and a check afterwards failed.

mod capacity;
mod forecast;
mod host;
mod machine;
mod machine_text;
mod migrate;
mod migration_text;
mod output;
mod plan;
mod run;
mod setup;
mod view;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::client::{Client, ClientError};
use crate::machine::chain;
use output::Output;

/// Where hostd's control socket is unless said otherwise.
const DEFAULT_SOCKET: &str = "/run/headroom/hostd.sock";

/// Headroom: virtual machines that move before their pool runs out of headroom.
#[derive(Debug, Parser)]
#[command(name = "headroom", version, after_help = EXAMPLES)]
struct Arguments {
    /// Control socket of the hostd to talk to [default: $HEADROOM_SOCKET, or /run/headroom/hostd.sock].
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Print JSON as the API gives it, for scripts.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  headroom init a1 --pool a --address 10.1.0.1 --peer b1=b=10.1.0.2   make /etc/headroom for host a1
  headroom run --memory 128                                         one machine in this terminal, without a daemon
  headroom machine create web-1 --memory 256 --disk 1024 --network  a machine with a disk of 1 GiB and a network card
  headroom migrate web-1 --to b1 --watch                            move it and see how it goes
  headroom host drain                                               move all machines away, for maintenance
  headroom pool                                                     capacity, load, forecast and score of all pools
  headroom event add 'nightly batch' --machine web-1 --in 600 --for 1800 --cpu 1.5
  headroom event add report --pool a --in 600 --for 1800 --cpu 4 --repeat 'FREQ=WEEKLY;BYDAY=MO,FR'
  headroom capacity                                                 hosts that the pools need over the next day
  headroom plan                                                     what the planner decided, and why

Exit codes:
  0  done
  1  refused or failed; the message says why and what to do
  2  wrong arguments
  3  hostd cannot be reached
  4  a migration that was waited for did not complete, and the message says where the machine is; or a host is not empty
  5  a migration that was waited for completed, and a digest or a declared probe failed";

#[derive(Debug, Subcommand)]
enum Command {
    /// Create, list, show and delete machines.
    #[command(subcommand)]
    Machine(machine::Command),
    /// Move a machine to another host.
    Migrate(migrate::Start),
    /// List, show and steer migrations: cancel, continue, limit, abandon.
    #[command(subcommand)]
    Migration(migrate::Command),
    /// Show all pools: capacity, load, forecast, contention score and trigger.
    #[command(visible_alias = "pools")]
    Pool,
    /// Show the forecasts of the machines of this host's pool, or evaluate forecasts on a recorded trace.
    Forecast(Or<forecast::Command>),
    /// Show how many hosts the pools need over the next day, when to order one and when to release one.
    Capacity(capacity::Arguments),
    /// Declare, list and remove load that is known to come.
    #[command(subcommand)]
    Event(view::EventCommand),
    /// Show what the planner decided, and why, or simulate its decisions on a recorded trace.
    Plan(plan::Arguments),
    /// Show the audit log.
    Audit(view::AuditArguments),
    /// Show this host and its peers; empty it for maintenance; limit its bandwidth.
    Host(Or<host::Command>),
    /// Two pools, three hosts and six machines on this computer: load grows, a machine moves in time, every promise is
    /// checked. Needs root and /dev/kvm; leaves nothing behind.
    Demo(DemoArguments),
    /// Run one machine in this terminal, without a daemon.
    Run(run::Arguments),
    /// Make the configuration of a host, and its certificate.
    Init(setup::Init),
    /// Make an authority, and certificates of hosts.
    #[command(subcommand)]
    Pki(setup::Pki),
}

/// A command that does something by itself, and has others below it.
#[derive(Debug, clap::Args)]
struct Or<C: Subcommand> {
    #[command(subcommand)]
    command: Option<C>,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// hostd refused, or cannot be reached.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A migration did not complete.
    #[error("{0}")]
    NotMoved(String),
    /// A machine was moved, and does not answer as it should.
    #[error("{0}")]
    Probe(String),
    /// Something else.
    #[error("{0}")]
    Other(String),
    /// The output is closed: somebody piped it into `head`.
    #[error("cannot write to standard output")]
    Output(#[from] std::io::Error),
}

impl Failure {
    fn other(error: &dyn std::error::Error) -> Self {
        Self::Other(chain(error))
    }

    fn code(&self) -> u8 {
        match self {
            Self::Client(ClientError::Connect { .. }) => 3,
            Self::NotMoved(_) => 4,
            Self::Probe(_) => 5,
            Self::Client(_) | Self::Other(_) | Self::Output(_) => 1,
        }
    }
}

/// `headroom demo`.
#[derive(Debug, clap::Args)]
struct DemoArguments {
    /// Where to write the report: `headroom demo --json FILE`.
    #[arg(value_name = "FILE", requires = "json")]
    report: Option<PathBuf>,
}

/// Runs the command line and returns its exit code.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Command::Demo(DemoArguments { report }) = arguments.command {
        if arguments.json && report.is_none() {
            eprintln!("headroom: say where the report shall go: headroom demo --json FILE");
            return ExitCode::from(2);
        }
        return crate::demo::main(&crate::demo::DemoOptions { json: report });
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("headroom: cannot start: {error}");
            return ExitCode::from(1);
        }
    };
    match runtime.block_on(dispatch(arguments)) {
        Ok(code) => code,
        Err(Failure::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("headroom: {}", chain(&failure));
            ExitCode::from(failure.code())
        }
    }
}

async fn dispatch(arguments: Arguments) -> Result<ExitCode, Failure> {
    let from_environment = || std::env::var_os("HEADROOM_SOCKET").map(PathBuf::from);
    let client = Client::new(arguments.socket.or_else(from_environment).unwrap_or_else(|| DEFAULT_SOCKET.into()));
    let output = Output::new(arguments.json);
    match arguments.command {
        Command::Machine(command) => machine::run(&client, &output, command).await?,
        Command::Migrate(start) => migrate::start(&client, &output, start).await?,
        Command::Migration(command) => migrate::run(&client, &output, command).await?,
        Command::Pool => view::pools(&client, &output).await?,
        Command::Forecast(Or { command }) => forecast::run(&client, &output, command).await?,
        Command::Capacity(arguments) => capacity::run(&client, &output, &arguments).await?,
        Command::Event(command) => view::event(&client, &output, command).await?,
        Command::Plan(arguments) => plan::run(&client, &output, arguments).await?,
        Command::Audit(arguments) => view::audit(&client, &output, &arguments).await?,
        Command::Host(Or { command }) => return host::run(&client, &output, command).await,
        // Blocks, and has been served before the runtime was made.
        Command::Demo(_) => {}
        Command::Run(arguments) => return run::run(arguments).await,
        Command::Init(arguments) => setup::init(&output, arguments)?,
        Command::Pki(command) => setup::pki(&output, command)?,
    }
    Ok(ExitCode::SUCCESS)
}
