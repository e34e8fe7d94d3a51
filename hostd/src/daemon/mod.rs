//! The daemon: its parts, and what the APIs ask of it.

mod act;
mod dirty_rate;
mod refit;
mod run;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use run::{Options, RunError, run};

use crate::api::problem::Failure;
use crate::api::types::{Event, HostSummary, HostView, MachineSummary, NewEvent, Plan, PlanOutcome, PoolView};
use crate::clock::unix_ms;
use crate::config::HostConfig;
use crate::digest::new_id;
use crate::drain::Drainer;
use crate::drain::gate::Gate;
use crate::executor::{Executor, Parts};
use crate::machine::Machines;
use crate::metrics::sampler::Round;
use crate::metrics::{capacity, room::Room};
use crate::planner::{History, Planner, PoolState, events};
use crate::pool::Peers;
use crate::pool::wire::PeerSummary;
use crate::security::access::{Access, Action, Actor, Object, Verdict};
use crate::security::audit::Audit;
use crate::security::images;
use crate::security::tls::{Identity, TlsError};
use crate::store::embedded::Kind;
use crate::store::{Store, StoreError};

/// Ended events are remembered for so long: the predictor closes them by itself.
const EVENT_KEEP_MS: u64 = 3_600_000;

/// Plans that are remembered.
const PLANS_MAX: usize = 1000;

/// One host's daemon.
#[derive(Debug)]
pub struct Daemon {
    /// Configuration.
    pub config: Arc<HostConfig>,
    /// Identity towards peers.
    pub identity: Identity,
    /// Store.
    pub store: Store,
    /// Audit log.
    pub audit: Audit,
    /// Machines of this host.
    pub machines: Machines,
    /// Other hosts.
    pub peers: Peers,
    /// Migrations.
    pub executor: Executor,
    /// Whether machines may come here.
    pub gate: Gate,
    pub(crate) drainer: Drainer,
    access: Access,
    planner: Arc<Mutex<Planner>>,
    round: Mutex<Round>,
    started_unix_ms: u64,
}

/// The daemon cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A folder cannot be made.
    #[error("cannot make the folder {}", path.display())]
    Folder {
        /// Folder.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The identity cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nothing can be forecast.
    #[error("`sample_interval_ms` and `planner.horizon_s` cannot be forecast")]
    Forecast(#[from] predictor::BankError),
}

impl Daemon {
    /// Puts the parts together; nothing runs yet.
    ///
    /// # Errors
    ///
    /// If folders, identity or store cannot be used.
    pub fn new(config: HostConfig) -> Result<Self, SetupError> {
        // Others may pass through run_dir to the socket, and see nothing else: folders of machines are 0700.
        make_folder(&config.run_dir, 0o711)?;
        make_folder(&config.state_dir, 0o700)?;
        let config = Arc::new(config);
        let identity = Identity::load(&config.host, &config.tls)?;
        let store = Store::open(&config.store_path())?;
        let audit = Audit::new(store.clone());
        let room = Room::new(capacity::measure(&config), config.capacity.disk_space_mib, config.images_dir());
        let machines = Machines::new(Arc::clone(&config), store.clone(), room);
        let peers = Peers::new(&config, &identity);
        let mut planner = Planner::new(&config)?;
        planner.remember(&earlier_plans(&store)?);
        planner.recall(History::load(&store, &config, unix_ms())?);
        planner.recall_week(&store, unix_ms())?;
        let planner = Arc::new(Mutex::new(planner));
        let gate = Gate::default();
        let drainer = Drainer::load(&store, gate.clone())?;
        let executor = Executor::new(Parts {
            config: Arc::clone(&config),
            store: store.clone(),
            machines: machines.clone(),
            peers: peers.clone(),
            identity: identity.clone(),
            audit: audit.clone(),
            planner: Arc::clone(&planner),
            gate: gate.clone(),
        })?;
        Ok(Self {
            access: Access::new(config.access.clone()),
            planner,
            round: Mutex::default(),
            started_unix_ms: unix_ms(),
            config,
            identity,
            store,
            audit,
            machines,
            peers,
            executor,
            gate,
            drainer,
        })
    }

    /// Decides whether `actor` may do `action`, and records it.
    ///
    /// # Errors
    ///
    /// 403 if not.
    pub fn permit(&self, actor: &Actor, action: Action, what: &str, object: Object<'_>) -> Result<(), Failure> {
        let verdict = self.access.decide(actor, action, object);
        self.audit.decided(actor, action, what, &verdict);
        if verdict.allowed {
            return Ok(());
        }
        let detail = format!(
            "{actor} may not {} {what} on host `{}` ({}): ask its operator for a rule in `access`",
            action.word(),
            self.config.host,
            verdict.rule
        );
        Err(Failure::new(403, "denied", detail))
    }

    /// Whether `actor` may give these files of this host to a machine, and records it if not.
    ///
    /// # Errors
    ///
    /// 403 if not, with the remedy.
    pub fn permit_files<'a>(
        &self,
        actor: &Actor,
        action: Action,
        what: &str,
        mut files: impl Iterator<Item = &'a Path>,
    ) -> Result<(), Failure> {
        files.try_for_each(|file| images::check(actor, file, &self.config.image_dirs)).map_err(|refused| {
            let failure = Failure::of(403, "denied", &refused);
            self.audit.decided(actor, action, what, &Verdict { allowed: false, rule: failure.0.detail.clone() });
            failure
        })
    }

    /// The planner; held for moments only.
    pub fn planner(&self) -> MutexGuard<'_, Planner> {
        self.planner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn round(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This host.
    pub async fn host_view(&self) -> HostView {
        let migration_bandwidth_bytes_per_second = self.executor.bandwidth().await;
        let round = self.round().clone();
        HostView {
            host: self.config.host.clone(),
            pool: self.config.pool.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_unix_ms: self.started_unix_ms,
            capacity: self.machines.capacity(),
            usage: round.host,
            system: round.system,
            pressure: round.pressure,
            machines: self.machines.all().len(),
            migrations: self.executor.running(),
            migration_bandwidth_bytes_per_second,
            drain: self.drain().state,
            peers: self.peers.views(),
        }
    }

    fn host_summary(&self) -> HostSummary {
        let round = self.round();
        let machines: Vec<MachineSummary> = self.machines.all().iter().map(|entry| entry.summary()).collect();
        HostSummary {
            host: self.config.host.clone(),
            live: true,
            draining: self.gate.closed(),
            capacity: self.machines.capacity(),
            usage: round.host,
            machines,
            sampled_unix_ms: round.at_unix_ms,
        }
    }

    /// What peers are told.
    pub fn summary(&self) -> PeerSummary {
        let own = self.planner().views().into_iter().find(|view| view.pool == self.config.pool);
        PeerSummary {
            pool: self.config.pool.clone(),
            host: self.host_summary(),
            pool_view: own,
            events: self.own_events(),
        }
    }

    /// All pools as measured last.
    fn pool_states(&self) -> Vec<PoolState> {
        let state = |pool: String| {
            let mut hosts = self.peers.summaries(&pool);
            if pool == self.config.pool {
                hosts.push(self.host_summary());
            }
            hosts.sort_by(|a, b| a.host.cmp(&b.host));
            PoolState { leader: self.peers.leader(&pool), hosts, pool }
        };
        self.peers.pools().into_iter().map(state).collect()
    }

    /// All pools as the API shows them: the trigger of another pool is what its leader says it is.
    pub fn pool_views(&self) -> Vec<PoolView> {
        let mut views = self.planner().views();
        for view in &mut views {
            let leader_here = view.leader.as_ref() == Some(&self.config.host);
            if !leader_here && let Some(told) = self.peers.pool_view(&view.pool) {
                view.trigger = told.trigger;
            }
        }
        views
    }

    /// The peer that was last heard to have a machine of that name: with two of them, one could never be moved to the other.
    pub fn host_of(&self, machine: &str) -> Option<String> {
        let pools = self.peers.pools();
        let hosts = pools.iter().flat_map(|pool| self.peers.summaries(pool));
        let mut having = hosts.filter(|host| host.machines.iter().any(|other| other.name == machine));
        having.next().map(|host| host.host)
    }

    fn own_events(&self) -> Vec<Event> {
        self.store.all(Kind::Event).unwrap_or_else(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, "cannot read events");
            Vec::new()
        })
    }

    /// Events declared here and on live peers, by their start.
    pub fn all_events(&self) -> Vec<Event> {
        let mut events = self.own_events();
        events.extend(self.peers.events());
        events.sort_by(|a, b| (a.starts_unix_ms, &a.id).cmp(&(b.starts_unix_ms, &b.id)));
        events.dedup_by(|a, b| a.id == b.id);
        events
    }

    /// Declares an event.
    ///
    /// # Errors
    ///
    /// If it makes no sense, or there are too many.
    pub fn add_event(&self, new: NewEvent) -> Result<Event, Failure> {
        if self.own_events().len() >= events::EVENTS_MAX {
            let detail = format!("there are {} events on this host already: remove some", events::EVENTS_MAX);
            return Err(Failure::new(409, "too-many-events", detail));
        }
        let id = new_id("evt").map_err(|error| Failure::new(500, "internal", error.to_string()))?;
        let event = events::accept(new, id, &self.config.host, unix_ms())
            .map_err(|detail| Failure::new(400, "invalid-request", detail))?;
        self.store.put(Kind::Event, &event.id, &event)?;
        Ok(event)
    }

    /// Removes an event.
    ///
    /// # Errors
    ///
    /// If it is not there, or was declared on another host.
    pub fn remove_event(&self, id: &str) -> Result<(), Failure> {
        let Some(event) = self.all_events().into_iter().find(|event| event.id == id) else {
            let detail =
                format!("there is no event `{}`: `headroom event list` shows those that are", id.escape_debug());
            return Err(Failure::new(404, "no-such-event", detail));
        };
        if event.declared_at != self.config.host {
            let detail = format!("event `{id}` was declared on host `{}`: remove it there", event.declared_at);
            return Err(Failure::new(409, "other-host", detail));
        }
        Ok(self.store.remove(Kind::Event, id)?)
    }

    /// Decisions of the planner, the newest first.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub fn plans(&self) -> Result<Vec<Plan>, StoreError> {
        let mut plans: Vec<Plan> = self.store.all(Kind::Plan)?;
        plans.sort_by_key(|plan| std::cmp::Reverse(plan.at_unix_ms));
        Ok(plans)
    }
}

/// Plans of an earlier hostd; one that waited has nobody who waits any more.
fn earlier_plans(store: &Store) -> Result<Vec<Plan>, StoreError> {
    let mut plans: Vec<Plan> = store.all(Kind::Plan)?;
    for plan in plans.iter_mut().filter(|plan| plan.outcome == PlanOutcome::Waiting) {
        plan.outcome = PlanOutcome::Dropped;
        plan.reasons.push("dropped: hostd was restarted, and plans anew".to_owned());
        store.put(Kind::Plan, &plan.id, plan)?;
    }
    Ok(plans)
}

fn make_folder(path: &std::path::Path, mode: u32) -> Result<(), SetupError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(|source| SetupError::Folder { path: path.to_owned(), source })
}
