//! `headroom host`: this host, its drain, its bandwidth.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::Failure;
use super::migrate::{Rate, rate};
use super::output::{Output, Table, bytes, or_dash, word};
use crate::api::types::{Drain, DrainRequest, DrainState, DrainStep, HostBandwidth};
use crate::client::Client;

/// How often the drain is asked for.
const POLL: Duration = Duration::from_millis(200);

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Close this host to machines and move all of its own to other hosts, with as many at a time as it moves at once.
    #[command(after_help = DRAIN)]
    Drain(DrainArguments),
    /// Open this host again. Moves that are under way are finished.
    Undrain,
    /// Change what this host may spend on migrations, until the configuration says something else.
    Limit {
        /// MiB per second over all migrations that leave this host, shared among them; `none` lifts the limit.
        #[arg(long, value_name = "MIB/S", value_parser = rate)]
        bandwidth: Rate,
    },
}

const DRAIN: &str = "\
Waits until the host is empty. Ctrl-C starts no further move: those under way are
finished, and the host stays closed. The same command goes on, and
`headroom host undrain` opens the host again.

Exit code 4: some machines cannot go, and each says why. They are tried again
every half minute until the host is opened.";

#[derive(Debug, Args)]
pub(super) struct DrainArguments {
    /// Hosts that may take the machines [default: all peers; those of the own pool first].
    #[arg(long, value_name = "HOST", num_args = 1..)]
    to: Vec<String>,
    /// Do not wait: the daemon goes on by itself.
    #[arg(long)]
    detach: bool,
    /// Only show how far it is.
    #[arg(long, conflicts_with_all = ["to", "detach"])]
    status: bool,
}

pub(super) async fn run(client: &Client, output: &Output, command: Option<Command>) -> Result<ExitCode, Failure> {
    match command {
        None => super::view::host(client, output).await?,
        Some(Command::Drain(drain)) => return start(client, output, drain).await,
        Some(Command::Undrain) => {
            client.end_drain().await?;
            output.print(&client.drain().await?, |_| "this host takes machines again".to_owned())?;
        }
        Some(Command::Limit { bandwidth: Rate(bandwidth_bytes_per_second) }) => {
            let set = client.set_bandwidth(&HostBandwidth { bandwidth_bytes_per_second }).await?;
            output.print(&set, |set| match set.bandwidth_bytes_per_second {
                Some(rate) => format!("migrations from this host share {}/s", bytes(rate as f64)),
                None => "migrations from this host are not limited".to_owned(),
            })?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn start(client: &Client, output: &Output, arguments: DrainArguments) -> Result<ExitCode, Failure> {
    if arguments.status {
        output.print(&client.drain().await?, text)?;
        return Ok(ExitCode::SUCCESS);
    }
    let drain = client.start_drain(&DrainRequest { to: arguments.to }).await?;
    if arguments.detach {
        output
            .print(&drain, |_| "it is being drained; `headroom host drain --status` shows how far it is".to_owned())?;
        return Ok(ExitCode::SUCCESS);
    }
    let ended = tokio::select! {
        ended = watch(client, output) => ended?,
        _ = tokio::signal::ctrl_c() => {
            let paused = client.pause_drain().await?;
            if output.live() {
                output.redraw("");
            }
            output.print(&paused, text)?;
            eprintln!("headroom: no further machine is moved; the host stays closed (`headroom host undrain` opens it)");
            return Ok(ExitCode::from(130));
        }
    };
    output.print(&ended, text)?;
    if ended.state == DrainState::Empty {
        return Ok(ExitCode::SUCCESS);
    }
    let left = ended.machines.iter().filter(|machine| machine.step != DrainStep::Moved).count();
    Err(Failure::NotMoved(format!(
        "{left} of its machines cannot go; they are tried again until `headroom host undrain`"
    )))
}

/// Until the host is empty, or nothing that is left can go.
async fn watch(client: &Client, output: &Output) -> Result<Drain, Failure> {
    let mut told: Vec<(String, DrainStep)> = Vec::new();
    loop {
        let drain = client.drain().await?;
        for machine in &drain.machines {
            let now = (machine.machine.clone(), machine.step);
            if told.contains(&now) {
                continue;
            }
            told.retain(|(name, _)| *name != machine.machine);
            told.push(now);
            if output.live() {
                output.redraw("");
                eprintln!("{}", line(machine));
            }
        }
        if output.live() {
            output.redraw(&summary(&drain));
        }
        if !matches!(drain.state, DrainState::Moving) {
            if output.live() {
                output.redraw("");
            }
            return Ok(drain);
        }
        tokio::time::sleep(POLL).await;
    }
}

fn line(machine: &crate::api::types::Drained) -> String {
    let to = machine.destination.as_deref().map(|host| format!(" to {host}")).unwrap_or_default();
    let why = machine.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
    format!("{} {}{to}{why}", machine.machine, word(machine.step))
}

fn summary(drain: &Drain) -> String {
    let count = |step| drain.machines.iter().filter(|machine| machine.step == step).count();
    format!(
        "{} moved, {} on their way, {} waiting, {} cannot go",
        count(DrainStep::Moved),
        count(DrainStep::Moving),
        count(DrainStep::Waiting),
        count(DrainStep::Blocked)
    )
}

fn text(drain: &Drain) -> String {
    if drain.state == DrainState::Open {
        return "this host is not being drained: it takes machines".to_owned();
    }
    let mut table = Table::new(&["MACHINE", "", "TO", "MIGRATION"]);
    for machine in &drain.machines {
        table.row(vec![
            machine.machine.clone(),
            word(machine.step),
            or_dash(machine.destination.clone()),
            or_dash(machine.migration.clone()),
        ]);
    }
    let why = drain.machines.iter().filter(|machine| machine.reason.is_some());
    let why: String = why.map(|machine| format!("{}\n", line(machine))).collect();
    let state = match drain.state {
        DrainState::Empty => "the host is empty, and closed until `headroom host undrain`".to_owned(),
        _ => format!("{}: {}", word(drain.state), summary(drain)),
    };
    format!("{}{why}{state}\n", table.text("no machines"))
}
