//! What the daemons say, polled over their control sockets by a thread of its own.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::reactive::Demand;
use super::scenario;
use crate::api::types::{Event, Migration, Plan, PoolView};
use crate::client::{Client, ClientError};
use crate::lab::{Lab, LabError, LabResult};

/// How often migrations and plans are asked for.
const TICK: Duration = Duration::from_millis(100);

/// Pools and events are asked for at every so many-th tick.
const POOLS_EVERY: u32 = 3;

/// The newest answers.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Both pools, as the busy pool's planner sees them.
    pub pools: Vec<PoolView>,
    /// Decisions, the newest first.
    pub plans: Vec<Plan>,
    /// Migrations that left a host of the busy pool, the newest first.
    pub migrations: Vec<Migration>,
    /// Declared events.
    pub events: Vec<Event>,
    /// Demand of the machines that began in the busy pool, wherever they run.
    pub demand: Vec<Demand>,
    /// Load of the busy pool itself.
    pub load: Vec<Demand>,
    /// Why the last question was not answered.
    pub error: Option<String>,
    /// Last known load of each machine in cores.
    pub(crate) usage: BTreeMap<String, f64>,
    /// When the newest sample was taken.
    pub(crate) sampled_unix_ms: u64,
}

impl View {
    /// One pool.
    pub fn pool(&self, name: &str) -> Option<&PoolView> {
        self.pools.iter().find(|pool| pool.pool == name)
    }

    /// The planner's first migration.
    pub fn migration(&self) -> Option<&Migration> {
        self.migrations.last()
    }

    /// The plan that started a migration.
    pub fn plan_of(&self, migration: &str) -> Option<&Plan> {
        self.plans.iter().find(|plan| plan.migration.as_deref() == Some(migration))
    }

    /// Takes new pools in and records the demand, once for each sample.
    fn take(&mut self, pools: Vec<PoolView>, at_s: f64) {
        self.pools = pools;
        let hosts = self.pools.iter().flat_map(|pool| &pool.hosts);
        for machine in hosts.clone().flat_map(|host| &host.machines) {
            if let Some(usage) = machine.usage {
                self.usage.insert(machine.name.clone(), usage.cpu_demand_cores.max(usage.cpu_cores));
            }
        }
        let sampled = hosts.map(|host| host.sampled_unix_ms).max().unwrap_or(0);
        if sampled <= self.sampled_unix_ms {
            return;
        }
        self.sampled_unix_ms = sampled;
        self.demand.push(Demand { at_s, cores: demand(&self.usage, at_s) });
        if let Some(cores) = self.pool(scenario::BUSY_POOL).map(|pool| pool.usage.cpu_cores) {
            self.load.push(Demand { at_s, cores });
        }
    }
}

/// What the machines that began in the busy pool want together: what was measured last, and no less than their guests are told to
/// use. A machine on its way is not measured, and where the computer has other work one does not get what it wants.
fn demand(usage: &BTreeMap<String, f64>, at_s: f64) -> f64 {
    let began = scenario::machines().into_iter().filter(|machine| machine.pool == scenario::BUSY_POOL);
    let told = |machine: &scenario::MachinePlan| f64::from(machine.cpu_percent(at_s)) / 100.0;
    began.map(|machine| usage.get(machine.name).copied().unwrap_or(0.0).max(told(&machine))).sum()
}

/// The thread that asks.
pub struct Feed {
    view: Arc<Mutex<View>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Feed {
    /// Starts to ask the daemons of `lab`. `on_migration` is called once for every migration that leaves the busy pool, as
    /// soon as it is known.
    ///
    /// # Errors
    /// When the thread or its runtime cannot be made.
    pub fn start(lab: &Lab, origin: Instant, on_migration: impl FnMut(&Migration) + Send + 'static) -> LabResult<Self> {
        let failed = |source| LabError::Io { action: "start", path: "the thread that asks the daemons".into(), source };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let clients = lab.hosts().iter().filter(|host| host.pool() == scenario::BUSY_POOL).map(|host| host.client());
        let clients: Vec<Client> = clients.collect();
        let (view, stop) = (Arc::new(Mutex::new(View::default())), Arc::new(AtomicBool::new(false)));
        let asker = Asker { clients, view: Arc::clone(&view), origin, known: Vec::new(), on_migration };
        let thread = std::thread::Builder::new().name("feed".into()).spawn({
            let stop = Arc::clone(&stop);
            move || runtime.block_on(asker.run(&stop))
        });
        Ok(Self { view, stop, thread: Some(thread.map_err(failed)?) })
    }

    /// The newest answers.
    pub fn view(&self) -> View {
        lock(&self.view).clone()
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Asker<F> {
    clients: Vec<Client>,
    view: Arc<Mutex<View>>,
    origin: Instant,
    known: Vec<String>,
    on_migration: F,
}

impl<F: FnMut(&Migration)> Asker<F> {
    async fn run(mut self, stop: &AtomicBool) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        for tick in 0u32.. {
            ticks.tick().await;
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let asked = self.ask(tick % POOLS_EVERY == 0).await;
            lock(&self.view).error = asked.err().map(|error| error.to_string());
        }
    }

    async fn ask(&mut self, pools: bool) -> Result<(), ClientError> {
        let mut migrations = Vec::new();
        for client in &self.clients {
            migrations.extend(client.migrations().await?);
        }
        migrations.sort_by_key(|migration| std::cmp::Reverse(migration.started_unix_ms));
        for migration in migrations.iter().filter(|migration| !self.known.contains(&migration.id)) {
            (self.on_migration)(migration);
        }
        self.known = migrations.iter().map(|migration| migration.id.clone()).collect();
        lock(&self.view).migrations = migrations;
        let Some(leader) = self.clients.first() else { return Ok(()) };
        let plans = leader.plans().await?;
        lock(&self.view).plans = plans;
        if pools {
            let (pools, events) = (leader.pools().await?, leader.events().await?);
            let mut view = lock(&self.view);
            view.events = events;
            view.take(pools, self.origin.elapsed().as_secs_f64());
        }
        Ok(())
    }
}

fn lock(view: &Mutex<View>) -> MutexGuard<'_, View> {
    view.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_is_not_measured_wants_what_its_guest_is_told() {
        let event = scenario::EVENT_S + 1.0;
        let told = demand(&BTreeMap::new(), event);
        let capacity: f64 = scenario::hosts()
            .iter()
            .filter(|host| host.pool == scenario::BUSY_POOL)
            .filter_map(|host| host.cpu_cores)
            .sum();
        assert!(told > capacity, "the event is contention, whatever was measured: {told} of {capacity}");
        let measured = |cores| BTreeMap::from([("vm1".to_owned(), cores)]);
        assert_eq!(demand(&measured(0.01), event), told, "it was measured before the event, and then moved");
        assert!(demand(&measured(2.0), event) > told + 1.0);
    }
}
