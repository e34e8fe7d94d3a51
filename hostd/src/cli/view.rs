//! Hosts, pools, forecasts, events, plans and the audit log.

use clap::{Args, Subcommand};

use super::Failure;
use super::output::{Output, Table, bytes, duration, or_dash, word};
use crate::api::types::{
    AuditRecord, DrainState, Event, EventTarget, HostView, MachineForecast, NewEvent, Plan, PlanOutcome, PoolView,
    Resource, ResourceForecast, TriggerState, TriggerView, Usage,
};
use crate::client::Client;
use crate::clock::{unix_ms, utc};

#[derive(Debug, Subcommand)]
pub(super) enum EventCommand {
    /// Declare load that is known to come.
    #[command(after_help = "\
An event that comes again is declared once, with a rule of RFC 5545 (iCalendar) in UTC: FREQ=MINUTELY, HOURLY, DAILY or WEEKLY, with
INTERVAL, COUNT (at most 10000), UNTIL=20271231T235959Z and BYDAY=MO,TU,... Months and years are not understood. Its first time is
the one given by --in, and it must not last longer than until its next time.

Examples:
  headroom event add 'nightly batch' --machine web-1 --in 600 --for 1800 --cpu 1.5 --memory 512
  headroom event add backup --pool a --in 3600 --for 1800 --disk 200 --repeat FREQ=DAILY
  headroom event add payroll --machine db-1 --in 600 --for 7200 --cpu 4 --repeat 'FREQ=WEEKLY;BYDAY=MO,FR;COUNT=20'")]
    Add(AddEvent),
    /// List declared events.
    #[command(visible_alias = "ls")]
    List,
    /// Remove an event.
    #[command(visible_alias = "rm")]
    Remove {
        /// Event.
        id: String,
    },
}

/// What will come, when, and how much of it.
#[derive(Debug, Args)]
pub(super) struct AddEvent {
    /// What it is; events of one name learn from each other.
    name: String,
    /// Machine whose load it changes.
    #[arg(long, required_unless_present = "pool", conflicts_with = "pool")]
    machine: Option<String>,
    /// Pool whose load it changes.
    #[arg(long)]
    pool: Option<String>,
    /// In how many seconds it starts.
    #[arg(long = "in", value_name = "S")]
    starts_in: f64,
    /// How many seconds it lasts.
    #[arg(long = "for", value_name = "S")]
    lasts: f64,
    /// When it comes again: a rule such as FREQ=DAILY or FREQ=WEEKLY;BYDAY=MO,FR (RFC 5545, UTC).
    #[arg(long = "repeat", value_name = "RULE")]
    repeats: Option<String>,
    /// Processor cores that it adds.
    #[arg(long, value_name = "CORES", default_value_t = 0.0)]
    cpu: f64,
    /// Memory that it adds, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 0.0)]
    memory: f64,
    /// Disk traffic that it adds, in MiB per second.
    #[arg(long, value_name = "MIB/S", default_value_t = 0.0)]
    disk: f64,
    /// Network traffic that it adds, in MiB per second.
    #[arg(long, value_name = "MIB/S", default_value_t = 0.0)]
    network: f64,
    /// How sure it is that it happens, above 0 and at most 1.
    #[arg(long, default_value_t = 0.9)]
    confidence: f64,
}

#[derive(Debug, Args)]
pub(super) struct PlanArguments {
    /// How many to show, the newest first.
    #[arg(long, default_value_t = 10)]
    limit: usize,
    /// Show the candidates that were weighed, too.
    #[arg(long)]
    candidates: bool,
}

#[derive(Debug, Args)]
pub(super) struct AuditArguments {
    /// How many records to show, 1 to 10,000.
    #[arg(long, default_value_t = 50)]
    limit: usize,
}

pub(super) async fn host(client: &Client, output: &Output) -> Result<(), Failure> {
    Ok(output.print(&client.host().await?, host_text)?)
}

fn host_text(host: &HostView) -> String {
    let usage = |usage: &Option<Usage>| {
        or_dash(usage.as_ref().map(|usage| {
            format!(
                "{:.2} cores, {:.0} MiB, disk {}/s, network {}/s",
                usage.cpu_cores,
                usage.memory_mib,
                bytes(usage.disk_bytes_per_second),
                bytes(usage.network_bytes_per_second)
            )
        }))
    };
    let mut text = format!(
        "host      {} (pool {}), hostd {}, pid {}, since {} UTC\ncapacity  {:.2} cores, {:.0} MiB, disk {}/s, network {}/s\n\
         machines  {} using {}\ncomputer  {}\n",
        host.host,
        host.pool,
        host.version,
        host.pid,
        utc(host.started_unix_ms),
        host.capacity.cpu_cores,
        host.capacity.memory_mib,
        bytes(host.capacity.disk_bytes_per_second),
        bytes(host.capacity.network_bytes_per_second),
        host.machines,
        usage(&host.usage),
        usage(&host.system),
    );
    if let Some(pressure) = &host.pressure {
        let share = |value: Option<f64>| or_dash(value.map(|value| format!("{value:.1} %")));
        text.push_str(&format!(
            "pressure  cpu {}, memory {}, io {}\n",
            share(pressure.cpu_percent),
            share(pressure.memory_percent),
            share(pressure.io_percent)
        ));
    }
    let budget = host.migration_bandwidth_bytes_per_second;
    let budget = budget.map_or("no limit".to_owned(), |rate| format!("{}/s shared", bytes(rate as f64)));
    text.push_str(&format!("moves     {} under way, bandwidth: {budget}\n", host.migrations));
    if host.drain != DrainState::Open {
        text.push_str(&format!("drain     {}: takes no machines (`headroom host drain --status`)\n", word(host.drain)));
    }
    let mut table = Table::new(&["PEER", "POOL", "ADDRESS", "LIVE", "LAST SEEN", "PROBLEM"]);
    for peer in &host.peers {
        let seen = peer.last_seen_unix_ms.map(|at| format!("{} ago", duration(unix_ms().saturating_sub(at) as f64)));
        let live = if peer.live { "yes" } else { "no" };
        table.row(vec![
            peer.host.clone(),
            peer.pool.clone(),
            peer.address.clone(),
            live.to_owned(),
            or_dash(seen),
            peer.error.clone().unwrap_or_default(),
        ]);
    }
    text.push('\n');
    text.push_str(&table.text("no peers: this host stands alone"));
    text
}

pub(super) async fn pools(client: &Client, output: &Output) -> Result<(), Failure> {
    let pools = client.pools().await?;
    Ok(output.print(&pools, |pools| pools.iter().map(pool_text).collect::<Vec<_>>().join("\n"))?)
}

fn pool_text(pool: &PoolView) -> String {
    let mut text = format!(
        "pool {}  leader {}  score {} within {}  {}\n",
        pool.pool,
        or_dash(pool.leader.clone()),
        or_dash(pool.score.map(|score| format!("{score:.2}"))),
        duration(pool.horizon_s * 1000.0),
        trigger_text(&pool.trigger),
    );
    let mut table = Table::new(&["  RESOURCE", "LOAD", "CAPACITY", "EXCEEDS (HOW SURE)", "AT THE END, 50 %", "95 %"]);
    for score in &pool.scores {
        let last = pool.forecasts.iter().rfind(|forecast| forecast.resource == score.resource);
        let quantile = |level: f64| or_dash(last.and_then(|last| at_level(last, level)));
        table.row(vec![
            format!("  {}", word(score.resource)),
            quantity(score.resource, score.load),
            quantity(score.resource, score.capacity),
            format!("{} ({:.0} %)", quantity(score.resource, score.limit), score.probability * 100.0),
            quantile(0.5),
            quantile(0.95),
        ]);
    }
    text.push_str(&table.text("  no forecast yet"));
    if let Some(expected) = pool.expected_contention_s {
        text.push_str(&format!("  contention is expected in {}\n", duration(expected * 1000.0)));
    }
    if let Some(fallback) = &pool.fallback {
        text.push_str(&format!("  forecasts are not trusted: {fallback}\n"));
    }
    for risk in &pool.at_risk {
        text.push_str(&format!(
            "  {} is likely to lack {} ({:.0} %): {}\n",
            risk.machine,
            word(risk.resource),
            100.0 * risk.probability,
            risk.reason
        ));
    }
    for host in &pool.hosts {
        let usage = host.usage.unwrap_or_default();
        text.push_str(&format!(
            "  host {}{}  {:.2} of {:.2} cores  {:.0} of {:.0} MiB  {}\n",
            host.host,
            if host.live { "" } else { " (does not answer)" },
            usage.cpu_cores,
            host.capacity.cpu_cores,
            usage.memory_mib,
            host.capacity.memory_mib,
            host.machines.iter().map(|machine| machine.name.as_str()).collect::<Vec<_>>().join(" "),
        ));
    }
    text
}

/// What the trigger does, and until when.
fn trigger_text(trigger: &TriggerView) -> String {
    let left = |until: Option<u64>| until.map(|until| duration(until.saturating_sub(unix_ms()) as f64));
    match trigger.state {
        TriggerState::Quiet => format!("quiet (acts from {:.2})", trigger.start_score),
        TriggerState::Planned => match left(trigger.latest_start_unix_ms) {
            Some(left) => format!("a move is planned (`headroom plan`) and starts in {left} at the latest"),
            None => "a move is planned (`headroom plan`)".to_owned(),
        },
        TriggerState::Cooldown => match left(trigger.cooldown_until_unix_ms) {
            Some(left) => format!("acted, rests for another {left}"),
            None => "acted, rests".to_owned(),
        },
        state => word(state),
    }
}

fn at_level(forecast: &ResourceForecast, level: f64) -> Option<String> {
    let quantile = forecast.quantiles.iter().find(|quantile| (quantile.probability - level).abs() < 1e-9)?;
    Some(quantity(forecast.resource, quantile.value))
}

pub(super) fn quantity(resource: Resource, value: f64) -> String {
    match resource {
        Resource::Cpu => format!("{value:.2} cores"),
        Resource::Memory => format!("{value:.0} MiB"),
        Resource::Io | Resource::Network => format!("{}/s", bytes(value)),
    }
}

pub(super) async fn forecasts(client: &Client, output: &Output) -> Result<(), Failure> {
    Ok(output.print(&client.forecasts().await?, |forecasts| forecast_text(forecasts))?)
}

fn forecast_text(forecasts: &[MachineForecast]) -> String {
    let mut table = Table::new(&["MACHINE", "HOST", "RESOURCE", "AHEAD", "50 %", "90 %", "95 %", "99 %"]);
    for machine in forecasts {
        for forecast in &machine.forecasts {
            let quantile = |level| or_dash(at_level(forecast, level));
            table.row(vec![
                machine.machine.clone(),
                machine.host.clone(),
                word(forecast.resource),
                duration(forecast.horizon_s * 1000.0),
                quantile(0.5),
                quantile(0.9),
                quantile(0.95),
                quantile(0.99),
            ]);
        }
    }
    table.text("no forecasts yet: there are no machines in this pool, or not enough samples")
}

pub(super) async fn event(client: &Client, output: &Output, command: EventCommand) -> Result<(), Failure> {
    match command {
        EventCommand::Add(add) => {
            let event = client.add_event(&new_event(add)).await?;
            output.print(&event, |event| {
                let again = event.repeats.as_ref().map(|rule| format!(", and again by {rule}")).unwrap_or_default();
                format!("{} declared: {} from {} UTC{again}", event.id, event.name, utc(event.starts_unix_ms))
            })?;
        }
        EventCommand::List => output.print(&client.events().await?, |events| event_text(events))?,
        EventCommand::Remove { id } => {
            client.remove_event(&id).await?;
            output.print(&serde_json::json!({"removed": id}), |_| format!("{id} is removed"))?;
        }
    }
    Ok(())
}

fn new_event(add: AddEvent) -> NewEvent {
    let target = match (add.machine, add.pool) {
        (Some(machine), _) => EventTarget::Machine(machine),
        (None, pool) => EventTarget::Pool(pool.unwrap_or_default()),
    };
    NewEvent {
        name: add.name,
        target,
        starts_unix_ms: None,
        starts_in_s: Some(add.starts_in),
        duration_s: add.lasts,
        repeats: add.repeats,
        adds: Usage {
            cpu_cores: add.cpu,
            cpu_demand_cores: 0.0,
            memory_mib: add.memory,
            disk_bytes_per_second: add.disk * 1_048_576.0,
            network_bytes_per_second: add.network * 1_048_576.0,
        },
        confidence: add.confidence,
    }
}

fn event_text(events: &[Event]) -> String {
    let mut table =
        Table::new(&["ID", "NAME", "OF", "STARTS (UTC)", "LASTS", "AGAIN", "CPU", "MEMORY", "SURE", "DECLARED AT"]);
    for event in events {
        let target = match &event.target {
            EventTarget::Machine(name) => format!("machine {name}"),
            EventTarget::Pool(name) => format!("pool {name}"),
        };
        table.row(vec![
            event.id.clone(),
            event.name.clone(),
            target,
            utc(event.starts_unix_ms),
            duration(event.ends_unix_ms.saturating_sub(event.starts_unix_ms) as f64),
            or_dash(event.repeats.clone()),
            format!("{:+.2}", event.adds.cpu_cores),
            format!("{:+.0} MiB", event.adds.memory_mib),
            format!("{:.0} %", event.confidence * 100.0),
            event.declared_at.clone(),
        ]);
    }
    table.text("no events are declared")
}

pub(super) async fn plans(client: &Client, output: &Output, arguments: &PlanArguments) -> Result<(), Failure> {
    let mut plans = client.plans().await?;
    plans.truncate(arguments.limit);
    let text = |plans: &Vec<Plan>| {
        if plans.is_empty() {
            return "the planner has decided nothing yet: no pool was about to run out of headroom".to_owned();
        }
        plans.iter().map(|plan| plan_text(plan, arguments.candidates)).collect::<Vec<_>>().join("\n")
    };
    Ok(output.print(&plans, text)?)
}

fn plan_text(plan: &Plan, candidates: bool) -> String {
    let what = match (&plan.machine, &plan.source, &plan.destination) {
        (Some(machine), Some(source), Some(destination)) => format!("move {machine} from {source} to {destination}"),
        _ => "nothing to be done".to_owned(),
    };
    let mut text = format!(
        "{}  {} UTC  pool {}  score {:.2}  {what}: {}{}{}\n",
        plan.id,
        utc(plan.at_unix_ms),
        plan.pool,
        plan.score,
        word(plan.outcome),
        plan.migration.as_ref().map(|id| format!(" ({id})")).unwrap_or_default(),
        match plan.latest_start_unix_ms {
            Some(at) if plan.outcome == PlanOutcome::Waiting => format!(", starts at {} UTC at the latest", utc(at)),
            _ => String::new(),
        },
    );
    for reason in &plan.reasons {
        text.push_str(&format!("  {reason}\n"));
    }
    for candidate in plan.candidates.iter().filter(|_| candidates) {
        let to = candidate.destination.as_deref().unwrap_or("nowhere");
        text.push_str(&format!("  {} to {to}: {}\n", candidate.machine, candidate.reason));
    }
    text
}

pub(super) async fn audit(client: &Client, output: &Output, arguments: &AuditArguments) -> Result<(), Failure> {
    Ok(output.print(&client.audit(arguments.limit).await?, |records| audit_text(records))?)
}

fn audit_text(records: &[AuditRecord]) -> String {
    let mut table = Table::new(&["#", "TIME (UTC)", "WHO", "ACTION", "WHAT", "DECISION", "DETAIL"]);
    for record in records {
        table.row(vec![
            record.sequence.to_string(),
            utc(record.at_unix_ms),
            record.actor.clone(),
            record.action.clone(),
            record.object.clone(),
            word(record.decision),
            record.detail.clone(),
        ]);
    }
    table.text("the audit log is empty")
}
