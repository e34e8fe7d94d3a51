//! The decision: which machine goes where, with its reasons.

use migration::report::{Trigger as Why, TriggerKind};
use predictor::{
    Contention, Course, Decision, HostView, MachineView, MigrationShape, PlanInput, PlanLimits, PoolForecaster,
    PoolView, Rejection, Resource, plan,
};

use super::convert::capacity_of;
use super::{Observed, Planner, PoolState, known, shape};
use crate::api::types::{
    Candidate, Event, EventTarget, HostSummary, MachineStatus, MachineSummary, MigrateRequest, Plan, PlanOutcome,
};
use crate::clock::unix_ms;

/// Bandwidth that is assumed before the first migration: one core's worth of TLS on one stream.
const BANDWIDTH: f64 = 600e6;

/// Candidates that a stored plan lists.
const CANDIDATES_MAX: usize = 50;

/// A move that was decided on.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The decision as it is stored.
    pub plan: Plan,
    /// Machine.
    pub machine: String,
    /// Host that runs it.
    pub source: String,
    /// What to ask of that host.
    pub request: MigrateRequest,
    /// What the prediction was made from.
    pub shape: MigrationShape,
}

impl Planner {
    /// Decides, if this host plans for its pool and the trigger fires. `Err` is a plan without a move: one that waits for its
    /// latest safe start, one that was dropped, or that nothing can be done (not more often than once a cooldown).
    pub fn decide(&mut self, id: &str, declared: &[Event]) -> Option<Result<Chosen, Plan>> {
        let own = self.config.pool.clone();
        let leads = self.states.iter().any(|s| s.pool == own && s.leader.as_deref() == Some(&self.host));
        if !leads || !self.config.planner.enabled {
            return self.drop_waiting("this host does not plan for the pool any more").map(Err);
        }
        let Decision::Act { score, .. } = self.last_decision else { return self.drop_if_calm().map(Err) };
        let state = self.states.iter().find(|state| state.pool == own)?.clone();
        let contention = self.contentions.get(&own).filter(|contention| known(contention))?.clone();
        let machines = self.machines(&state);
        let (pools, hosts) = self.others(&own);
        let now_s = self.now_s();
        // While a threshold decides, the goal is not a probability that is not trusted.
        let goal = if self.falls_back() { 0.0 } else { self.limits.goal };
        let limits = PlanLimits { goal, ..self.limits.clone() };
        let made = plan(&PlanInput {
            now_s,
            source_pool: &own,
            source: &contention,
            course: &self.course(&own),
            machines: &machines,
            pools: &pools,
            hosts: &hosts,
            weights: self.weights(),
            in_flight: self.in_flight(),
            log: &self.log,
            cost: &self.cost,
            limits: &limits,
        });
        let mut stored = self.stored_plan(id, score, &contention, &made, &machines);
        let Some(best) = made.moves.first() else { return self.nothing_to_do(stored).map(Err) };
        stored.machine = Some(best.machine.clone());
        stored.source = Some(best.from_host.clone());
        stored.destination = Some(best.to_host.clone());
        if !self.falls_back() && self.waits(&mut stored, best, now_s) {
            return self.keep_waiting(stored).map(Err);
        }
        stored.outcome = PlanOutcome::Started;
        let why = Why {
            kind: kind(&state, declared, contention.horizon_s),
            score: Some(score),
            horizon_s: Some(contention.horizon_s),
            predicted_total_ms: Some(best.cost.total_ms),
            predicted_downtime_ms: Some(best.cost.downtime_ms),
        };
        let request = MigrateRequest {
            destination: best.to_host.clone(),
            limits: self.config.planner.limits.clone(),
            trigger: why,
            ..MigrateRequest::default()
        };
        let shape = machines.iter().find(|machine| machine.name == best.machine).map(|m| m.shape).unwrap_or_default();
        self.trigger.acted(now_s);
        self.last_plan_s = Some(now_s);
        // It is the plan that waited, if one did.
        if let Some(waited) = self.waiting.take() {
            stored.id = waited.id;
        }
        Some(Ok(Chosen { plan: stored, machine: best.machine.clone(), source: best.from_host.clone(), request, shape }))
    }

    /// A plan as it is stored, without a move.
    fn stored_plan(
        &self,
        id: &str,
        score: f64,
        contention: &Contention,
        made: &predictor::Plan,
        machines: &[MachineView],
    ) -> Plan {
        let distrust = self.guarded.iter().filter_map(|guarded| guarded.reason.as_ref());
        Plan {
            id: id.to_owned(),
            at_unix_ms: unix_ms(),
            pool: self.config.pool.clone(),
            planner: self.host.clone(),
            score,
            horizon_s: contention.horizon_s,
            machine: None,
            source: None,
            destination: None,
            reasons: distrust.chain(&contention.reasons).chain(&made.explanation).cloned().collect(),
            candidates: candidates(made, machines),
            migration: None,
            latest_start_unix_ms: None,
            outcome: PlanOutcome::NoAction,
        }
    }

    fn nothing_to_do(&mut self, stored: Plan) -> Option<Plan> {
        if let Some(dropped) = self.drop_waiting("no move is possible any more") {
            return Some(dropped);
        }
        let now_s = self.now_s();
        let again = self.last_plan_s.is_none_or(|last| now_s - last >= self.config.planner.cooldown_s.max(5.0));
        if again {
            self.last_plan_s = Some(now_s);
        }
        again.then_some(stored)
    }

    /// The pool's machines as candidates.
    pub(super) fn machines(&self, state: &PoolState) -> Vec<MachineView> {
        let all = state.live().flat_map(|host| host.machines.iter().map(move |machine| (host, machine)));
        all.filter(|(_, machine)| machine.status != MachineStatus::Incoming)
            .map(|(host, machine)| self.candidate(state, host, machine))
            .collect()
    }

    fn candidate(&self, state: &PoolState, host: &HostSummary, machine: &MachineSummary) -> MachineView {
        let forecaster = self.pools.get(&state.pool);
        let limits = self.config.planner.limits.as_ref().unwrap_or(&machine.limits);
        let network = host.capacity.network_bytes_per_second.max(1.0);
        let bandwidth = limits.bandwidth_bytes_per_second.map_or(f64::INFINITY, |limit| limit as f64);
        let bandwidth = bandwidth.min(self.bandwidth.unwrap_or(BANDWIDTH)).min(network);
        let observed = self.observed.get(&machine.name).copied();
        let observed = observed.or_else(|| machine.dirty.map(Observed::from)).unwrap_or_default();
        let pinned = match machine.status {
            MachineStatus::Running | MachineStatus::Migrating => None,
            status => Some(format!("it is {status:?}")),
        };
        MachineView {
            name: machine.name.clone(),
            host: host.host.clone(),
            demand: predictor::PerResource::from_fn(|resource| {
                self.pools.machine_forecast(&state.pool, &machine.name, resource, self.horizon_steps)
            }),
            course: forecaster.and_then(|own| own.machine_course(&machine.name)).unwrap_or_default(),
            shape: shape(machine, observed, bandwidth, limits.downtime_ms),
            acceptable_downtime_ms: limits.downtime_ms as f64,
            pinned,
            migrating: machine.status == MachineStatus::Migrating,
            cpu_profile: String::new(),
            apart_from: Vec::new(),
        }
    }

    /// What a pool's machines used together lately.
    fn course(&self, pool: &str) -> Course {
        self.pools.get(pool).map(PoolForecaster::course).unwrap_or_default()
    }

    /// The other pools and their hosts.
    fn others(&self, own: &str) -> (Vec<PoolView>, Vec<HostView>) {
        let others = || self.states.iter().filter(|state| state.pool != own);
        let pools = others().filter_map(|state| {
            let contention = self.contentions.get(&state.pool)?.clone();
            Some(PoolView { name: state.pool.clone(), contention, course: self.course(&state.pool) })
        });
        let hosts = others().flat_map(|state| {
            state.hosts.iter().filter(|host| !host.draining).map(move |host| self.target(state, host))
        });
        (pools.collect(), hosts.collect())
    }

    fn target(&self, state: &PoolState, host: &HostSummary) -> HostView {
        let moving =
            |machine: &&MachineSummary| matches!(machine.status, MachineStatus::Incoming | MachineStatus::Migrating);
        HostView {
            name: host.host.clone(),
            pool: state.pool.clone(),
            capacity: capacity_of(&host.capacity),
            expected_use: predictor::PerResource::from_fn(|resource| Some(self.expected_use(host, resource))),
            machines: host.machines.iter().map(|machine| machine.name.clone()).collect(),
            in_flight: host.machines.iter().filter(moving).count(),
            cpu_profiles: Vec::new(),
            closed: (!host.live).then(|| "it does not answer".to_owned()),
        }
    }

    /// What a host's machines are expected to use at most (90 %), those that are arriving included. Memory that was promised
    /// to a machine is promised, whether it uses it or not.
    fn expected_use(&self, host: &HostSummary, resource: Resource) -> f64 {
        host.machines.iter().filter_map(|machine| self.expected_demand(&machine.name, resource)).sum()
    }

    /// What a machine is expected to use at most (90 %) at the end of the horizon; `None` if it was not measured yet.
    pub(super) fn expected_demand(&self, machine: &str, resource: Resource) -> Option<f64> {
        let forecast = |(pool, _)| self.pools.machine_forecast(pool, machine, resource, self.horizon_steps);
        self.pools.iter().find_map(forecast).map(|forecast| forecast.quantile(0.9))
    }

    fn in_flight(&self) -> usize {
        let hosts = self.states.iter().flat_map(PoolState::live);
        let moving = |machine: &&MachineSummary| machine.status == MachineStatus::Migrating;
        hosts.map(|host| host.machines.iter().filter(moving).count()).sum()
    }
}

/// A declared event of the pool, or of a machine in it, within the horizon makes it a move for that event.
fn kind(pool: &PoolState, declared: &[Event], horizon_s: f64) -> TriggerKind {
    let (now, horizon) = (unix_ms(), (horizon_s * 1000.0) as u64);
    let concerns = |event: &&Event| match &event.target {
        EventTarget::Machine(name) => pool.live().any(|host| host.machines.iter().any(|machine| &machine.name == name)),
        EventTarget::Pool(name) => name == &pool.pool,
    };
    let declared = super::events::occurrences(declared, now, horizon_s);
    let near = |event: &Event| event.starts_unix_ms <= now + horizon && event.ends_unix_ms > now;
    if declared.iter().filter(concerns).any(near) { TriggerKind::Event } else { TriggerKind::Forecast }
}

fn candidates(made: &predictor::Plan, machines: &[MachineView]) -> Vec<Candidate> {
    let host_of = |name: &str| {
        machines.iter().find(|machine| machine.name == name).map(|machine| machine.host.clone()).unwrap_or_default()
    };
    let chosen = made.moves.iter().map(|best| Candidate {
        machine: best.machine.clone(),
        source: best.from_host.clone(),
        destination: Some(best.to_host.clone()),
        benefit_minutes: Some(best.benefit_minutes - best.harm_minutes),
        cost_bytes: Some(best.cost.bytes),
        predicted_total_ms: Some(best.cost.total_ms),
        predicted_downtime_ms: Some(best.cost.downtime_ms),
        reason: best.explanation.clone(),
    });
    let rejected = made.rejected.iter().map(|Rejection { machine, host, why, .. }| Candidate {
        machine: machine.clone(),
        source: host_of(machine),
        destination: host.clone(),
        benefit_minutes: None,
        cost_bytes: None,
        predicted_total_ms: None,
        predicted_downtime_ms: None,
        reason: why.clone(),
    });
    chosen.chain(rejected).take(CANDIDATES_MAX).collect()
}
