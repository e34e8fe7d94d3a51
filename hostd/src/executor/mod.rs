//! Migrations between daemons.
//!
//! ```text
//!  source hostd                                      destination hostd
//!  Queued      waits for a free place
//!  Reserving   POST /v1/peer/migrations ───────────► identity, rules, name, room, processor; disks, taps, VMM (incoming)
//!              ◄─────────────── address, token ───── Transferring: watches its VMM
//!  Transferring  own VMM: send ═════ engine, mutual TLS ═════► VMM: receive
//!                polls progress                      committed: the machine is Running here
//!  Verifying   POST …/verify ──────────────────────► asks the declared probes
//!              frees VMM, taps, disks                Completed
//!  Completed
//!
//!  on failure  POST …/settle ──────────────────────► clears away, says `never`; the machine goes on at the source
//!  in doubt    Settling: POST …/settle, again and    cancels its VMM: refused once committed, so it knows, and says
//!              again, until there is an answer       `runs`, `never` or `lost` for good
//!
//!  post-copy   Transferring: its VMM sends what is   Verifying: the machine is Running here, and lacks some of itself
//!              missing, however long that takes
//!  lost link   both VMMs wait for each other. Given up by an operator at either host, after recover_s at the destination, or
//!              when one of the processes is gone: both say Lost, the machine is Stopped here with its disks and there
//! ```
//!
//! An attempt that failed before Commit for a reason that may be gone soon is followed by another one ([`retry`]); the
//! migrations that leave at the same time share one bandwidth ([`budget`]).
//!
//! A machine may be sent on, or back, as soon as it runs: the new migration then waits for what is left of the one before
//! it (verification at the destination, probes and clearing away at the source).
//!
//! Every stage is stored before it is acted upon. After a restart of either daemon the VMMs are found again and each
//! unfinished migration goes on where it was: the source asks its VMM how far it is and the destination where the machine
//! runs.

mod arrived;
mod bandwidth;
pub mod budget;
pub mod destination;
mod failure;
pub mod probe;
mod problem;
mod recover;
pub mod retry;
mod settle;
mod source;
mod steer;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use crate::api::types::{MigrateRequest, Migration, MigrationSide, MigrationStage};
use crate::clock::unix_ms;
use crate::config::HostConfig;
use crate::config::RETRIES_MAX;
use crate::digest::{NoRandom, new_id};
use crate::drain::gate::Gate;
use crate::machine::{MachineError, Machines, spec};
use crate::metrics::cpu::CpuFeatures;
use crate::planner::Planner;
use crate::pool::{PeerError, Peers};
use crate::security::audit::Audit;
use crate::security::tls::Identity;
use crate::store::embedded::Kind;
use crate::store::{Store, StoreError};

/// How long a migration waits for the end of the one before it, of the same machine.
const OVERLAP_PATIENCE: Duration = Duration::from_secs(30);

/// Ended migrations that are remembered.
const REMEMBERED: usize = 1000;

/// How long it is remembered in any case that a machine came here: its source may be in doubt and ask, and would run it as well if
/// it were told that nobody knows of it.
const ARRIVALS_REMEMBERED: Duration = Duration::from_secs(30 * 86_400);

/// A migration cannot be started, found or cancelled.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// The destination is not a peer.
    #[error("`{0}` is not a peer of this host: the destinations are {1}; add it to `peers` in the configuration")]
    NoPeer(String, String),
    /// The destination is this host.
    #[error("`{0}` is this host: the machine is here already")]
    Here(String),
    /// No such migration.
    #[error("there is no migration `{0}` on this host: `headroom migration list` shows those that are known")]
    Unknown(String),
    /// The id was used before.
    #[error("migration `{0}` was settled before: start another one")]
    Used(String),
    /// Too late, too early, or not to be steered from here.
    #[error("migration `{id}` cannot be {what}: {why}")]
    NotNow {
        /// Migration.
        id: String,
        /// What was asked for, as a participle.
        what: &'static str,
        /// Why not.
        why: String,
    },
    /// The host takes no machines.
    #[error("host `{0}` is being drained and takes no machines: choose another one, or `headroom host undrain` there")]
    Draining(String),
    /// It cannot be decided where the machine runs.
    #[error("migration `{id}` cannot be settled: {why}")]
    Undecided {
        /// Migration.
        id: String,
        /// Why not.
        why: String,
    },
    /// The host is busy with others.
    #[error(
        "host `{host}` takes part in {limit} migrations already: try again when one has ended, or raise concurrent_migrations"
    )]
    Busy {
        /// Host.
        host: String,
        /// Its limit.
        limit: usize,
    },
    /// The processor lacks something.
    #[error("the processor of host `{host}` lacks what the machine may use: {}; choose a host with these features", missing.join(", "))]
    Processor {
        /// Host.
        host: String,
        /// Features.
        missing: Vec<String>,
    },
    /// The machine came here, or left from here, a moment ago, and that migration does not end.
    #[error(
        "migration `{id}` of the same machine has not ended after {waited_s} s: see `headroom migration show {id}` on host `{host}`, and try again"
    )]
    Overlap {
        /// The earlier migration.
        id: String,
        /// Where it has not ended.
        host: String,
        /// For how long it was waited.
        waited_s: u64,
    },
    /// The load would not fit.
    #[error("no room on host `{host}`: {detail}")]
    Load {
        /// Host.
        host: String,
        /// Which resource, and how much.
        detail: String,
    },
    /// Something about the machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The other host.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No random numbers.
    #[error(transparent)]
    Random(#[from] NoRandom),
}

type Result<T> = std::result::Result<T, ExecutorError>;

/// One migration that has not ended, or ended since hostd started.
#[derive(Debug)]
pub struct Active {
    state: watch::Sender<Migration>,
    cancelled: watch::Sender<bool>,
    /// At the destination: nothing more will come, whatever is missing.
    abandoned: watch::Sender<bool>,
    /// At the source, in doubt: an operator says that the destination is gone for good.
    taken_back: watch::Sender<bool>,
}

impl Active {
    fn new(migration: Migration) -> Self {
        let no = || watch::Sender::new(false);
        // Told to, and stopped before it was done.
        let taken_back = watch::Sender::new(migration.taken_back.as_ref() == Some(&migration.attempt_id()));
        Self { state: watch::Sender::new(migration), cancelled: no(), abandoned: no(), taken_back }
    }

    /// As it is now.
    pub fn get(&self) -> Migration {
        self.state.borrow().clone()
    }
}

/// Moves machines; cheap to clone.
#[derive(Clone, Debug)]
pub struct Executor {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Arc<HostConfig>,
    store: Store,
    machines: Machines,
    peers: Peers,
    identity: Identity,
    audit: Audit,
    planner: Arc<Mutex<Planner>>,
    cpu: CpuFeatures,
    slots: Arc<Semaphore>,
    budget: budget::Budget,
    gate: Gate,
    active: Mutex<BTreeMap<String, Arc<Active>>>,
}

/// What an executor works with.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Configuration of this host.
    pub config: Arc<HostConfig>,
    /// Where migrations are remembered.
    pub store: Store,
    /// Machines of this host.
    pub machines: Machines,
    /// The other hosts.
    pub peers: Peers,
    /// Identity of this host, given to VMMs.
    pub identity: Identity,
    /// Audit log.
    pub audit: Audit,
    /// Forecasts of this host.
    pub planner: Arc<Mutex<Planner>>,
    /// Whether machines may come here.
    pub gate: Gate,
}

impl Executor {
    /// An executor without migrations; [`Executor::recover`] finds those of an earlier hostd.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub fn new(parts: Parts) -> std::result::Result<Self, StoreError> {
        let Parts { config, store, machines, peers, identity, audit, planner, gate } = parts;
        let slots = Arc::new(Semaphore::new(config.concurrent_migrations));
        let cpu = CpuFeatures::of_this_host();
        let budget = budget::Budget::new(bandwidth::load(&store, config.migration.bandwidth_bytes_per_second)?);
        let active = Mutex::default();
        let inner =
            Inner { config, store, machines, peers, identity, audit, planner, cpu, slots, budget, gate, active };
        Ok(Self { inner: Arc::new(inner) })
    }

    fn active(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Active>>> {
        self.inner.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to move a machine away; goes on in the background.
    ///
    /// # Errors
    ///
    /// If the machine, the destination or the limits are not fit for it.
    pub fn start(&self, machine: &str, request: &MigrateRequest) -> Result<Migration> {
        let inner = &self.inner;
        if request.destination == inner.config.host {
            return Err(ExecutorError::Here(request.destination.clone()));
        }
        if inner.peers.get(&request.destination).is_none() {
            let known: Vec<&str> = inner.config.peers.iter().map(|peer| peer.host.as_str()).collect();
            let known = if known.is_empty() { "(none)".to_owned() } else { known.join(", ") };
            return Err(ExecutorError::NoPeer(request.destination.escape_debug().to_string(), known));
        }
        let limits = request.limits.clone();
        let limits = match limits {
            Some(limits) => limits,
            None => inner.machines.get(machine)?.record().limits,
        };
        spec::limits(&limits)?;
        let defaults = &inner.config.migration;
        let retries_left = request.retries.unwrap_or(defaults.retries);
        if retries_left > RETRIES_MAX {
            let text = format!("{retries_left} retries are asked for: at most {} are possible", RETRIES_MAX);
            return Err(MachineError::Invalid(text).into());
        }
        let id = new_id("mig")?;
        let migration = Migration {
            trigger: request.trigger.clone(),
            limits,
            pause_before_switchover: request.pause_before_switchover,
            on_failed_probe: request.on_failed_probe.unwrap_or(defaults.on_failed_probe),
            retries_left,
            ..Migration::new(&id, machine, MigrationSide::Source, &inner.config.host, &request.destination)
        };
        let entry = inner.machines.begin_migration(machine, &migration.id)?;
        let active = self.enter(migration.clone()).inspect_err(|_| inner.machines.stays(&entry))?;
        let executor = self.clone();
        tokio::spawn(async move { executor.run_source(&active, &entry).await });
        Ok(migration)
    }

    /// Remembers a new migration.
    fn enter(&self, migration: Migration) -> Result<Arc<Active>> {
        self.inner.store.put(Kind::Migration, &migration.id, &migration)?;
        let active = Arc::new(Active::new(migration.clone()));
        self.active().insert(migration.id, Arc::clone(&active));
        Ok(active)
    }

    /// Changes a migration and stores it. A failing store is logged: the machine matters more than its record.
    fn update(&self, active: &Active, change: impl FnOnce(&mut Migration)) {
        active.state.send_modify(|migration| {
            change(migration);
            if migration.stage.ended() && migration.ended_unix_ms.is_none() {
                migration.ended_unix_ms = Some(unix_ms());
                migration.progress = None;
            }
        });
        let migration = active.get();
        if let Err(error) = self.inner.store.put(Kind::Migration, &migration.id, &migration) {
            tracing::error!(id = migration.id, error = &error as &dyn std::error::Error, "cannot store a migration");
        }
        if migration.stage.ended() {
            let detail = match (&migration.error, migration.stage) {
                (Some(error), stage) => format!("{stage:?}: {error}"),
                (None, stage) => format!("{stage:?}: {} to {}", migration.source, migration.destination),
            };
            self.inner.audit.noted("migration-ended", &migration.object(), &detail);
            self.forget_oldest();
        }
    }

    fn forget_oldest(&self) {
        let since = unix_ms().saturating_sub(ARRIVALS_REMEMBERED.as_millis() as u64);
        let age = |one: &Migration| {
            let came = one.side == MigrationSide::Destination
                && matches!(one.stage, MigrationStage::Completed | MigrationStage::Lost);
            let kept = !one.stage.ended() || one.taken_back.is_some() || (came && one.started_unix_ms > since);
            (!kept).then_some(one.started_unix_ms)
        };
        let pruned = self.inner.store.prune::<Migration>(Kind::Migration, REMEMBERED, age);
        if let Err(error) = pruned {
            tracing::error!(error = &error as &dyn std::error::Error, "cannot forget old migrations");
        }
        self.active().retain(|_, active| !active.state.borrow().stage.ended());
    }

    /// Shows progress without storing it.
    fn progress(active: &Active, status: vmm::api::MigrationStatus) {
        active.state.send_modify(|migration| migration.progress = Some(status));
    }

    /// One migration.
    ///
    /// # Errors
    ///
    /// [`ExecutorError::Unknown`].
    pub fn get(&self, id: &str) -> Result<Migration> {
        if let Some(active) = self.active().get(id) {
            return Ok(active.get());
        }
        self.inner.store.get(Kind::Migration, id)?.ok_or_else(|| ExecutorError::Unknown(id.escape_debug().to_string()))
    }

    /// All migrations, the newest first.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub fn all(&self) -> Result<Vec<Migration>> {
        let mut migrations: Vec<Migration> = self.inner.store.all(Kind::Migration)?;
        for migration in &mut migrations {
            if let Some(active) = self.active().get(&migration.id) {
                *migration = active.get();
            }
        }
        migrations.sort_by_key(|migration| std::cmp::Reverse(migration.started_unix_ms));
        Ok(migrations)
    }

    /// Waits until migrations of `machine` that `wanted` picks have ended: the machine runs elsewhere, or here, already, and
    /// what is left to do for it (verification, probes, clearing away) takes a moment.
    async fn overlap(&self, machine: &str, wanted: impl Fn(&Migration) -> bool) -> Result<()> {
        let earlier = |active: &&Arc<Active>| {
            let migration = active.state.borrow();
            migration.machine == machine && !migration.stage.ended() && wanted(&migration)
        };
        let earlier: Vec<Arc<Active>> = self.active().values().filter(earlier).cloned().collect();
        let deadline = tokio::time::Instant::now() + OVERLAP_PATIENCE;
        for active in earlier {
            let mut state = active.state.subscribe();
            let ended = state.wait_for(|migration| migration.stage.ended());
            if tokio::time::timeout_at(deadline, ended).await.is_err() {
                let (id, host) = (active.get().id, self.inner.config.host.clone());
                return Err(ExecutorError::Overlap { id, host, waited_s: OVERLAP_PATIENCE.as_secs() });
            }
        }
        Ok(())
    }

    /// How many have not ended.
    pub fn running(&self) -> usize {
        self.active().values().filter(|active| !active.state.borrow().stage.ended()).count()
    }
}
