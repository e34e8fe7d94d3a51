//! `hostd`, the daemon of one host.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use hostd::config::HostConfig;
use hostd::daemon::{Options, run};

/// The daemon of one host: makes, measures, forecasts and moves its machines.
///
/// It stops on SIGTERM or SIGINT. Its machines run on, and the next hostd finds them again, unless --stop-machines is given.
#[derive(Debug, Parser)]
#[command(name = "hostd", version)]
struct Arguments {
    /// Configuration of this host; `headroom init` makes one.
    #[arg(long, default_value = "/etc/headroom/hostd.json")]
    config: PathBuf,
    /// Shut the machines down when the daemon stops.
    #[arg(long)]
    stop_machines: bool,
    /// Check the configuration and end.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    match daemon() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line with all causes: it goes to a journal.
            eprintln!("hostd: {}", hostd::machine::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn daemon() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("HEADROOM_LOG").unwrap_or_else(|_| "info".into());
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    let config = HostConfig::load(&arguments.config)?;
    if arguments.check {
        println!("{} is in order", arguments.config.display());
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    runtime.block_on(run(config, Options { stop_machines: arguments.stop_machines }))?;
    Ok(())
}
