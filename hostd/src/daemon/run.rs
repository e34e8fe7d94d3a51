//! The life of the daemon: recover, listen, measure, plan, stop.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use super::{Daemon, EVENT_KEEP_MS, SetupError};
use crate::api::types::{Event, Usage};
use crate::api::{control, peer, router, serve};
use crate::clock::unix_ms;
use crate::config::HostConfig;
use crate::executor::ExecutorError;
use crate::flag::stopped;
use crate::machine::{MachineError, chain};
use crate::metrics::sampler::{Round, Sampler};
use crate::planner::{PoolState, events, history};
use crate::store::embedded::Kind;

/// Samples are put on stable storage, and old ones forgotten, once in this time.
const FLUSH: Duration = Duration::from_secs(60);

/// How long open requests may take to end when the daemon stops.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// How often what has had its time is looked for.
const TIDY_EVERY: Duration = Duration::from_secs(10);

/// How it runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Shut the machines down when the daemon stops; otherwise they run on and the next hostd finds them again.
    pub stop_machines: bool,
}

/// The daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It cannot be set up.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// It cannot listen.
    #[error("cannot listen on {what}: {remedy}")]
    Listen {
        /// Address or path.
        what: String,
        /// What to do.
        remedy: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Signals cannot be received.
    #[error("cannot receive signals")]
    Signals(#[source] io::Error),
    /// Machines of an earlier hostd cannot be found again.
    #[error("cannot take up the machines of an earlier hostd")]
    Machines(#[from] MachineError),
    /// Migrations of an earlier hostd cannot be taken up.
    #[error("cannot take up the migrations of an earlier hostd")]
    Migrations(#[from] ExecutorError),
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
///
/// If it cannot be set up or cannot listen.
pub async fn run(config: HostConfig, options: Options) -> Result<(), RunError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    let daemon = Arc::new(Daemon::new(config)?);
    let address = daemon.config.listen;
    let peers = TcpListener::bind(address).await.map_err(|source| RunError::Listen {
        what: address.to_string(),
        remedy: "is another program on it, and is it an address of this host? (`listen` in the configuration)",
        source,
    })?;
    let control = serve::listen_unix(&daemon.config).map_err(|source| RunError::Listen {
        what: daemon.config.socket.display().to_string(),
        remedy: "is the folder there, and no other hostd on it? (`socket` in the configuration)",
        source,
    })?;
    daemon.machines.recover().await?;
    daemon.executor.recover()?;
    let (stop, stopped) = watch::channel(false);
    let tasks = [
        tokio::spawn(serve::serve_unix(
            control,
            router(control::routes(), Arc::clone(&daemon)),
            Arc::clone(&daemon),
            stopped.clone(),
        )),
        tokio::spawn(serve::serve_peers(
            peers,
            router(peer::routes(), Arc::clone(&daemon)),
            Arc::clone(&daemon),
            stopped.clone(),
        )),
        tokio::spawn(exchange(Arc::clone(&daemon), stopped.clone())),
        tokio::spawn(crate::drain::run(Arc::clone(&daemon), stopped.clone())),
        tokio::spawn(super::dirty_rate::run(Arc::clone(&daemon), stopped.clone())),
        tokio::spawn(super::refit::run(Arc::clone(&daemon), stopped.clone())),
        tokio::spawn(tidy(Arc::clone(&daemon), stopped.clone())),
        tokio::spawn(measure(Arc::clone(&daemon), stopped)),
    ];
    daemon.audit.noted("started", &format!("host:{}", daemon.config.host), env!("CARGO_PKG_VERSION"));
    tell_ready(&daemon.config);
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!(signal = name, stop_machines = options.stop_machines, "stopping");
    stop.send_replace(true);
    for task in tasks {
        let _ = tokio::time::timeout(STOP_PATIENCE, task).await;
    }
    if options.stop_machines {
        daemon.machines.stop_all().await;
    }
    let _ = std::fs::remove_file(&daemon.config.socket);
    daemon.audit.noted("stopped", &format!("host:{}", daemon.config.host), name);
    Ok(())
}

/// One line on standard output, and a word to systemd where it started us (sd_notify(3)).
fn tell_ready(config: &HostConfig) {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    println!("hostd {} of pool {} is ready: {}, {}", config.host, config.pool, config.socket.display(), config.listen);
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let notify = || -> io::Result<()> {
        let bytes = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str());
        let address = match bytes.split_first() {
            Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&path)?,
        };
        UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address).map(drop)
    };
    if let Err(error) = notify() {
        tracing::warn!(%error, "NOTIFY_SOCKET could not be told");
    }
}

/// Asks peers for their summaries, once an interval.
async fn exchange(daemon: Arc<Daemon>, mut stop: watch::Receiver<bool>) {
    let mut ticks = interval(Duration::from_millis(daemon.config.sample_interval_ms));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => daemon.peers.exchange().await,
            () = stopped(&mut stop) => return,
        }
    }
}

/// Removes what has had its time.
async fn tidy(daemon: Arc<Daemon>, mut stop: watch::Receiver<bool>) {
    let mut ticks = interval(TIDY_EVERY);
    loop {
        tokio::select! {
            _ = ticks.tick() => daemon.machines.expire_partial(),
            () = stopped(&mut stop) => return,
        }
    }
}

/// Measures, forecasts and plans, once an interval.
async fn measure(daemon: Arc<Daemon>, mut stop: watch::Receiver<bool>) {
    let mut sampler = Sampler::new(daemon.machines.clone());
    let mut ticks = interval(Duration::from_millis(daemon.config.sample_interval_ms));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut flushed = tokio::time::Instant::now();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stopped(&mut stop) => return,
        }
        let round = sampler.sample().await;
        let flush = flushed.elapsed() >= FLUSH;
        if flush {
            flushed = tokio::time::Instant::now();
        }
        let recorder = Arc::clone(&daemon);
        let work = tokio::task::spawn_blocking(move || recorder.step(&round, flush)).await;
        match work {
            Ok(Some(decision)) => Arc::clone(&daemon).act(decision),
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "a measurement was lost"),
        }
    }
}

impl Daemon {
    /// Remembers a round of measurements, forecasts, and decides.
    fn step(&self, round: &Round, flush: bool) -> Option<Result<crate::planner::Chosen, crate::api::types::Plan>> {
        *self.round() = round.clone();
        let states = self.pool_states();
        if let Err(error) = self.remember(round, &states, flush) {
            tracing::error!(error = chain(&error), "measurements cannot be stored");
        }
        let declared = self.all_events();
        let id = match crate::digest::new_id("plan") {
            Ok(id) => id,
            Err(error) => {
                tracing::error!(%error, "no plan");
                return None;
            }
        };
        let mut planner = self.planner();
        if let Err(error) = planner.tick(states, &declared) {
            tracing::error!(error = chain(&error), "no forecast");
            return None;
        }
        planner.decide(&id, &declared)
    }

    /// Stores what the forecasts are made from: machines of other hosts too, so that all forecasts go on after a restart.
    fn remember(&self, round: &Round, states: &[PoolState], flush: bool) -> Result<(), crate::store::StoreError> {
        let measured = states.iter().flat_map(PoolState::measured);
        let mut samples: Vec<(String, Usage)> =
            measured.map(|(name, usage)| (format!("{}{name}", history::PREFIX), usage)).collect();
        samples.extend(round.host.map(|usage| ("host".to_owned(), usage)));
        self.store.add_samples(round.at_unix_ms, &samples, flush)?;
        if flush {
            let now = unix_ms();
            self.store.expire_samples(now)?;
            for event in self.store.all::<Event>(Kind::Event)? {
                if events::is_over(&event, EVENT_KEEP_MS, now) {
                    self.store.remove(Kind::Event, &event.id)?;
                }
            }
        }
        Ok(())
    }
}
