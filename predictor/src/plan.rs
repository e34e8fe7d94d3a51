//! Which machine goes where, what that is worth, what it costs, and until when it has to start.
//!
//! The worth of a move is in violation minutes: time in which a pool is above its limit, each minute with its probability, and
//! weighing more the further above (so that one move of two that are needed is worth something). A move avoids some at the
//! source from the moment when it is over, and may cause some at the target; both are asked of the pools' courses with and
//! without the machine ([`crate::course`]), and of their forecasts as far as they stand where they never stood. Candidates are taken one by one:
//! of those that do nearly as well as the best the one that is worth most per byte; the rest is scored again after each.

use crate::candidates::{
    HostView, MachineView, MoveLog, Obstacle, PlanLimits, PoolView, Rejection, host_obstacle, machine_obstacle,
};
use crate::contention::{Contention, combine};
use crate::cost::{Cost, CostModel};
use crate::course::Course;
use crate::sample::{PerResource, Resource};
use crate::worth::{Changed, Counted, either, minutes, novelty};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// All that a plan is made from.
#[derive(Clone, Copy, Debug)]
pub struct PlanInput<'a> {
    /// The caller's clock in seconds.
    pub now_s: f64,
    /// Name of the pool that needs relief.
    pub source_pool: &'a str,
    /// How it stands.
    pub source: &'a Contention,
    /// What its machines used together lately, and their events; empty = not known.
    pub course: &'a Course,
    /// Its machines.
    pub machines: &'a [MachineView],
    /// The other pools.
    pub pools: &'a [PoolView],
    /// Hosts of the other pools.
    pub hosts: &'a [HostView],
    /// How much each resource counts, as in [`crate::PoolConfig::weights`].
    pub weights: PerResource<f64>,
    /// Migrations that run now, anywhere.
    pub in_flight: usize,
    /// Past moves.
    pub log: &'a MoveLog,
    /// What migrations cost.
    pub cost: &'a CostModel,
    /// Hard limits.
    pub limits: &'a PlanLimits,
}

/// One move of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Move {
    /// The machine.
    pub machine: String,
    /// The host that it leaves.
    pub from_host: String,
    /// The pool that it leaves.
    pub from_pool: String,
    /// The host that it goes to.
    pub to_host: String,
    /// The pool that it goes to.
    pub to_pool: String,
    /// Score of the source before the move.
    pub score_before: f64,
    /// Score of the source expected after it.
    pub score_after: f64,
    /// Violation minutes avoided at the source: minutes above the limit, each with its probability and severity.
    pub benefit_minutes: f64,
    /// Violation minutes caused at the target.
    pub harm_minutes: f64,
    /// What it takes.
    pub cost: Cost,
    /// When contention is expected, seconds on the caller's clock.
    pub contention_at_s: f64,
    /// The migration has to start until then to be over before contention; before `now` if it is too late already.
    pub latest_start_s: f64,
    /// All that in words.
    pub explanation: String,
}

/// What to do, and why not something else.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Plan {
    /// In the order in which they should start.
    pub moves: Vec<Move>,
    /// Candidates that hard limits or a lack of benefit kept back.
    pub rejected: Vec<Rejection>,
    /// The decision in words and numbers, one line each.
    pub explanation: Vec<String>,
}

/// Shifts of a pool's use by moves so far.
type Shift = PerResource<f64>;

/// What is known of one machine whatever host of a pool it goes to.
#[derive(Default)]
struct Known<'a> {
    /// Minutes avoided, and the score after it has left.
    source: Option<(f64, f64)>,
    /// Minutes caused in each pool, and its score.
    targets: BTreeMap<&'a str, (f64, f64)>,
}

/// A candidate with its worth.
struct Candidate<'a> {
    machine: &'a MachineView,
    host: &'a HostView,
    pool: &'a PoolView,
    demand: Shift,
    cost: Cost,
    benefit: f64,
    harm: f64,
    after: f64,
}

impl Candidate<'_> {
    fn net(&self) -> f64 {
        self.benefit - self.harm
    }

    /// Net violation minutes avoided per byte moved.
    fn worth(&self) -> f64 {
        self.net() / self.cost.bytes.max(1.0)
    }
}

/// Makes a plan. Pure: the same input gives the same plan.
#[must_use]
pub fn plan(input: &PlanInput<'_>) -> Plan {
    let mut state = State::new(input);
    let room = input.limits.in_flight.saturating_sub(input.in_flight).min(input.limits.moves);
    if room == 0 {
        state.plan.explanation.push(format!(
            "no move: {} migrations in flight, {} allowed at once, {} in a plan",
            input.in_flight, input.limits.in_flight, input.limits.moves
        ));
        return state.plan;
    }
    for _ in 0..room {
        let before = score(input.source, &state.source.gone, &input.weights);
        if before < input.limits.goal {
            break;
        }
        let candidates = state.candidates(before);
        let Some(best) = choose(&candidates) else { break };
        let chosen = state.describe(best, before);
        state.take(chosen, best.machine, best.host, &best.demand);
    }
    state.conclude();
    state.plan
}

/// Violation minutes to expect of a pool within the horizon if nothing moves: no move avoids more.
#[must_use]
pub fn expected_minutes(
    contention: &Contention,
    course: &Course,
    weights: &PerResource<f64>,
    limits: &PlanLimits,
) -> f64 {
    let there = Changed { course: course.clone(), ..Changed::default() };
    let counted = Counted { from_s: 0.0, lasting_s: limits.lasting_s };
    minutes(contention, &there, &novelty(contention, course), weights, counted)
}

/// Of the candidates that avoid nearly as much as the best, the one that is worth most per byte.
fn choose<'a, 'b>(candidates: &'b [Candidate<'a>]) -> Option<&'b Candidate<'a>> {
    let most = candidates.iter().map(Candidate::net).max_by(f64::total_cmp)?;
    let nearly = candidates.iter().filter(|candidate| candidate.net() >= NEARLY * most);
    nearly.max_by(|a, b| {
        let by_worth = a.worth().total_cmp(&b.worth());
        by_worth.then_with(|| b.machine.name.cmp(&a.machine.name)).then_with(|| b.host.name.cmp(&a.host.name))
    })
}

/// A move that avoids this share of what the best one does is nearly as good.
const NEARLY: f64 = 0.8;

struct State<'a> {
    input: &'a PlanInput<'a>,
    /// The source as moves so far leave it.
    source: Changed,
    /// How new what it does is.
    novelty: PerResource<f64>,
    /// Other pools as moves so far leave them, and the same of them.
    targets: BTreeMap<&'a str, (Changed, PerResource<f64>)>,
    /// What arrived at hosts by moves so far, and how many machines.
    arrived: BTreeMap<String, (Shift, usize)>,
    plan: Plan,
}

impl<'a> State<'a> {
    fn new(input: &'a PlanInput<'a>) -> Self {
        let course = |course: &Course| Changed { course: course.clone(), ..Changed::default() };
        Self {
            input,
            source: course(input.course),
            novelty: novelty(input.source, input.course),
            targets: input
                .pools
                .iter()
                .map(|pool| (pool.name.as_str(), (course(&pool.course), novelty(&pool.contention, &pool.course))))
                .collect(),
            arrived: BTreeMap::new(),
            plan: Plan::default(),
        }
    }

    /// All allowed moves with their worth; the others are noted as rejected.
    fn candidates(&mut self, before: f64) -> Vec<Candidate<'a>> {
        let mut found = Vec::new();
        let mut rejected = Vec::new();
        for machine in self.input.machines {
            if self.plan.moves.iter().any(|chosen| chosen.machine == machine.name) {
                continue;
            }
            let cost = self.input.cost.predict(&machine.shape);
            if let Some(why) = machine_obstacle(machine, &cost) {
                rejected.push(Rejection {
                    machine: machine.name.clone(),
                    host: None,
                    obstacle: Obstacle::Machine,
                    why,
                });
                continue;
            }
            let mut known = Known::default();
            for host in self.input.hosts {
                match self.candidate(machine, host, cost, before, &mut known) {
                    Ok(candidate) => found.push(candidate),
                    Err((obstacle, why)) => {
                        let (machine, host) = (machine.name.clone(), Some(host.name.clone()));
                        rejected.push(Rejection { machine, host, obstacle, why });
                    }
                }
            }
        }
        self.plan.rejected = rejected;
        found
    }

    fn candidate(
        &self,
        machine: &'a MachineView,
        host: &'a HostView,
        cost: Cost,
        before: f64,
        known: &mut Known<'a>,
    ) -> Result<Candidate<'a>, (Obstacle, String)> {
        let input = self.input;
        if host.pool == input.source_pool {
            let why = format!("is in pool {} too: moving there relieves nothing", host.pool);
            return Err((Obstacle::Target, why));
        }
        let unknown = || (Obstacle::Target, format!("nothing is known of its pool {}", host.pool));
        let pool = input.pools.iter().find(|pool| pool.name == host.pool).ok_or_else(unknown)?;
        let rests = || input.log.forbids(&machine.name, &host.pool, input.now_s, input.limits);
        if let Some(why) = rests().or_else(|| input.log.refused(&machine.name, &host.name, input.now_s)) {
            return Err((Obstacle::Rest, why));
        }
        let (more, arriving) = self.arrived.get(&host.name).copied().unwrap_or_default();
        if let Some(why) = host_obstacle(machine, host, &more, arriving, input.limits) {
            return Err((Obstacle::Target, why));
        }
        let demand = PerResource::from_fn(|resource| expected_demand(machine, resource));
        let counted = Counted { from_s: cost.total_ms / 1000.0, lasting_s: input.limits.lasting_s };
        let here = |changed: &Changed| minutes(input.source, changed, &self.novelty, &input.weights, counted);
        let (benefit, after) = *known.source.get_or_insert_with(|| {
            let without = self.source.without(&machine.name, &machine.course, &demand);
            let expected = here(&self.source);
            // Where there is too little to be avoided, nobody avoids enough.
            let enough = expected >= input.limits.minimum_benefit_minutes;
            let left = if enough { here(&without) } else { 0.0 };
            (expected - left, score(input.source, &without.gone, &input.weights))
        });
        let too_little = |harm: f64| {
            format!(
                "would avoid {benefit:.2} and cause {harm:.2} violation minutes (score {before:.2} to {after:.2}), at least \
                 {:.2} net are asked for",
                input.limits.minimum_benefit_minutes
            )
        };
        let (there, known_there) = self.targets.get(host.pool.as_str()).ok_or_else(unknown)?;
        let (harm, target_score) = *known.targets.entry(&host.pool).or_insert_with(|| {
            let with = there.with(&machine.course, &demand);
            // A move that avoids too little is not asked what it would cause.
            let asked = benefit >= input.limits.minimum_benefit_minutes;
            // What is new about the source may be the machine.
            let novelty = either(&self.novelty, known_there);
            let at = |changed: &Changed| minutes(&pool.contention, changed, &novelty, &input.weights, counted);
            let caused = if asked { at(&with) - at(there) } else { 0.0 };
            (caused, score(&pool.contention, &with.gone, &input.weights))
        });
        if target_score > input.limits.target_score {
            let allowed = input.limits.target_score;
            let why = format!("pool {} would reach a score of {target_score:.2}, {allowed:.2} allowed", pool.name);
            return Err((Obstacle::Target, why));
        }
        let candidate = Candidate { machine, host, pool, demand, cost, benefit, harm, after };
        // What cannot be compared is not worth a move either.
        if candidate.net() >= input.limits.minimum_benefit_minutes {
            return Ok(candidate);
        }
        let enough = benefit >= input.limits.minimum_benefit_minutes;
        Err((if enough { Obstacle::MuchCaused } else { Obstacle::LittleAvoided }, too_little(harm)))
    }

    fn describe(&self, best: &Candidate<'_>, before: f64) -> Move {
        let input = self.input;
        let contention_at_s = input.now_s + onset_s(input.source, input.limits.onset);
        let latest_start_s = contention_at_s - best.cost.total_ms_p90 / 1000.0 - input.limits.margin_s;
        let in_s = latest_start_s - input.now_s;
        let latest = if in_s >= 0.0 {
            format!("has to start within {in_s:.0} s")
        } else {
            format!("{:.0} s too late to be over before contention", -in_s)
        };
        let why = input.source.reasons.first().map_or("", String::as_str);
        let explanation = format!(
            "move {} from {}/{} to {}/{}: {why}; it takes {} away, score {before:.2} to {:.2}, avoids {:.1} and causes {:.1} \
             violation minutes; about {:.1} s (90 %: {:.1} s) and {:.0} ms of downtime for {}; {latest}",
            best.machine.name,
            input.source_pool,
            best.machine.host,
            best.pool.name,
            best.host.name,
            amounts(&best.demand),
            best.after,
            best.benefit,
            best.harm,
            best.cost.total_ms / 1000.0,
            best.cost.total_ms_p90 / 1000.0,
            best.cost.downtime_ms,
            Resource::Memory.quantity(best.cost.bytes),
        );
        Move {
            machine: best.machine.name.clone(),
            from_host: best.machine.host.clone(),
            from_pool: input.source_pool.to_owned(),
            to_host: best.host.name.clone(),
            to_pool: best.pool.name.clone(),
            score_before: before,
            score_after: best.after,
            benefit_minutes: best.benefit,
            harm_minutes: best.harm,
            cost: best.cost,
            contention_at_s,
            latest_start_s,
            explanation,
        }
    }

    fn take(&mut self, chosen: Move, machine: &MachineView, host: &HostView, demand: &Shift) {
        self.source = self.source.without(&machine.name, &machine.course, demand);
        if let Some((target, known)) = self.targets.get_mut(host.pool.as_str()) {
            *target = target.with(&machine.course, demand);
            *known = either(known, &self.novelty);
        }
        let arrived = self.arrived.entry(host.name.clone()).or_default();
        arrived.0 = plus(&arrived.0, demand);
        arrived.1 += 1;
        self.plan.explanation.push(chosen.explanation.clone());
        self.plan.moves.push(chosen);
    }

    fn conclude(&mut self) {
        let after = score(self.input.source, &self.source.gone, &self.input.weights);
        let line = match (self.plan.moves.is_empty(), after < self.input.limits.goal) {
            (true, true) => format!("no move: score {after:.2} is below the goal of {:.2}", self.input.limits.goal),
            (true, false) => match self.plan.rejected.first() {
                Some(first) => format!(
                    "no move possible at score {after:.2}: {} candidates rejected, for example {}{}: {}",
                    self.plan.rejected.len(),
                    first.machine,
                    first.host.as_ref().map(|host| format!(" to {host}")).unwrap_or_default(),
                    first.why
                ),
                None => format!("no move possible at score {after:.2}: there is no machine or no host to consider"),
            },
            (false, true) => {
                format!("score after the plan: {after:.2}, below the goal of {:.2}", self.input.limits.goal)
            }
            (false, false) => {
                format!("score after the plan: {after:.2}, still above the goal of {:.2}", self.input.limits.goal)
            }
        };
        self.plan.explanation.push(line);
    }
}

fn expected_demand(machine: &MachineView, resource: Resource) -> f64 {
    machine.demand[resource].map_or(0.0, |forecast| forecast.point).max(0.0)
}

fn plus(a: &Shift, b: &Shift) -> Shift {
    PerResource::from_fn(|resource| a[resource] + b[resource])
}

fn amounts(demand: &Shift) -> String {
    let parts: Vec<String> = demand
        .iter()
        .filter(|(_, amount)| **amount > 0.0)
        .map(|(resource, amount)| match resource {
            Resource::Cpu => resource.quantity(*amount),
            _ => format!("{} {resource}", resource.quantity(*amount)),
        })
        .collect();
    if parts.is_empty() { "nothing known".to_owned() } else { parts.join(", ") }
}

/// The score of a pool from which `gone` was taken away (negative: brought there).
#[must_use]
pub fn score(contention: &Contention, gone: &PerResource<f64>, weights: &PerResource<f64>) -> f64 {
    let probabilities = PerResource::from_fn(|resource| {
        let state = contention.resources[resource].as_ref()?;
        state.maxima.iter().map(|maximum| maximum.exceedance(state.limit + gone[resource])).reduce(f64::max)
    });
    combine(&probabilities, weights).0
}

/// When contention is to be expected, in seconds from now: when the most pressing resource reaches `level` of probability, or
/// the end of the horizon.
fn onset_s(contention: &Contention, level: f64) -> f64 {
    let reached = contention.resources.iter().filter_map(|(_, state)| state.as_ref()?.reaches(level));
    reached.fold(contention.horizon_s, f64::min)
}
