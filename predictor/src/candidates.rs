//! What could be moved where, and what forbids it.

use crate::contention::Contention;
use crate::cost::{Cost, MigrationShape};
use crate::course::Course;
use crate::forecast::Forecast;
use crate::sample::{PerResource, Resource};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A machine of the pool that needs relief.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct MachineView {
    /// Its name.
    pub name: String,
    /// The host that it runs on.
    pub host: String,
    /// What it is expected to use at the end of the horizon; `None` = not known, counted as nothing.
    pub demand: PerResource<Option<Forecast>>,
    /// What it used lately, and its events; empty = not known, so that moving it is judged by `demand` alone.
    #[serde(default)]
    pub course: Course,
    /// What a migration of it would have to carry.
    pub shape: MigrationShape,
    /// The longest downtime that its owner accepts, in milliseconds.
    pub acceptable_downtime_ms: f64,
    /// Why it must stay where it is, if it must (`pinned by operator`, `host device`).
    pub pinned: Option<String>,
    /// Whether it is being migrated now.
    pub migrating: bool,
    /// The CPU profile that it was started with; empty if any will do.
    pub cpu_profile: String,
    /// Machines that must not share a host with it.
    pub apart_from: Vec<String>,
}

/// A host of another pool.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct HostView {
    /// Its name.
    pub name: String,
    /// Its pool.
    pub pool: String,
    /// What it has; `None` = not known, not checked.
    pub capacity: PerResource<Option<f64>>,
    /// What its machines, those that are arriving included, are expected to use at most.
    pub expected_use: PerResource<Option<f64>>,
    /// Names of its machines.
    pub machines: Vec<String>,
    /// Migrations that arrive or leave now.
    pub in_flight: usize,
    /// CPU profiles that it can give a machine.
    pub cpu_profiles: Vec<String>,
    /// Why it takes no machine, if so (`draining`, `unreachable for 12 s`).
    pub closed: Option<String>,
}

/// Another pool, and how it stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PoolView {
    /// Its name.
    pub name: String,
    /// Its own forecast.
    pub contention: Contention,
    /// What its machines used together lately, and their events; empty = not known.
    #[serde(default)]
    pub course: Course,
}

/// Limits that no plan exceeds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PlanLimits {
    /// A plan tries to bring the score of the source below this.
    pub goal: f64,
    /// Contention is expected when its probability has reached this, or at the end of the horizon.
    pub onset: f64,
    /// No target pool's score may rise above this by a move.
    pub target_score: f64,
    /// Share of a target host's capacity that may be used after the move.
    pub target_use: PerResource<f64>,
    /// Moves in one plan.
    pub moves: usize,
    /// Migrations that may run at once, over all pools seen.
    pub in_flight: usize,
    /// Migrations that may run at once at one target host.
    pub in_flight_per_host: usize,
    /// A machine rests this long after a move, doubled with every further move, in seconds.
    pub machine_cooldown_s: f64,
    /// The longest rest of a machine in seconds.
    pub longest_machine_cooldown_s: f64,
    /// For so many seconds a machine does not go back to the pool that it left.
    pub no_return_s: f64,
    /// Violation minutes that a move has to avoid, net.
    pub minimum_benefit_minutes: f64,
    /// A migration should be over this long before contention is expected, in seconds.
    pub margin_s: f64,
    /// How long a contention that is seen at the end of the horizon is taken to last, in seconds.
    pub lasting_s: f64,
}

impl Default for PlanLimits {
    fn default() -> Self {
        Self {
            goal: 0.2,
            onset: 0.5,
            target_score: 0.2,
            target_use: PerResource { cpu: 0.9, memory: 0.9, io: 0.9, network: 0.9 },
            moves: 1,
            in_flight: 2,
            in_flight_per_host: 1,
            machine_cooldown_s: 900.0,
            longest_machine_cooldown_s: 6.0 * 3600.0,
            no_return_s: 3600.0,
            minimum_benefit_minutes: 0.05,
            margin_s: 5.0,
            lasting_s: 600.0,
        }
    }
}

/// What kind of obstacle kept a candidate back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Obstacle {
    /// The machine may not move at all.
    Machine,
    /// It rests after an earlier move, or was refused there lately.
    Rest,
    /// The host or its pool takes none.
    Target,
    /// It would avoid too little at the source.
    LittleAvoided,
    /// It would avoid enough, and cause too much at the target.
    MuchCaused,
}

/// A candidate that was not taken, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rejection {
    /// The machine.
    pub machine: String,
    /// The host that it might have gone to; `None` if the machine could go nowhere.
    pub host: Option<String>,
    /// What kind of reason it is.
    pub obstacle: Obstacle,
    /// Why not, with the numbers.
    pub why: String,
}

/// One past move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct PastMove {
    at_s: f64,
    from_pool: String,
    count: u32,
    lasted_s: f64,
}

/// Past moves of machines: against moving the same one again and again, or back.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct MoveLog {
    moves: BTreeMap<String, PastMove>,
    /// Refused moves of machines: to which host, and until when they are not tried again.
    #[serde(default)]
    refused: BTreeMap<String, BTreeMap<String, f64>>,
}

impl MoveLog {
    /// Notes that `machine` left `from_pool` at `at_s` with a migration of `lasted_s` seconds.
    pub fn note(&mut self, machine: &str, from_pool: &str, at_s: f64, lasted_s: f64, limits: &PlanLimits) {
        let rested = |past: &PastMove| at_s - past.at_s > 2.0 * limits.longest_machine_cooldown_s;
        let count = self.moves.get(machine).filter(|past| !rested(past)).map_or(0, |past| past.count);
        let count = count.saturating_add(1);
        self.moves.insert(machine.to_owned(), PastMove { at_s, from_pool: from_pool.to_owned(), count, lasted_s });
    }

    /// Notes that a move of `machine` to `host` was refused at `now_s`: it is not tried again for `back_off_s` seconds.
    pub fn refuse(&mut self, machine: &str, host: &str, now_s: f64, back_off_s: f64) {
        // What has passed is forgotten here, so that this does not grow with time.
        self.refused.values_mut().for_each(|hosts| hosts.retain(|_, until_s| *until_s > now_s));
        self.refused.retain(|_, hosts| !hosts.is_empty());
        self.refused.entry(machine.to_owned()).or_default().insert(host.to_owned(), now_s + back_off_s);
    }

    /// Why `machine` is not tried at `host` again yet, if so.
    #[must_use]
    pub fn refused(&self, machine: &str, host: &str, now_s: f64) -> Option<String> {
        let left_s = self.refused.get(machine)?.get(host)? - now_s;
        (left_s > 0.0).then(|| format!("was refused there lately, is tried again in {left_s:.0} s"))
    }

    /// Why `machine` may not move to `pool` at `now_s`, if so.
    #[must_use]
    pub fn forbids(&self, machine: &str, pool: &str, now_s: f64, limits: &PlanLimits) -> Option<String> {
        let past = self.moves.get(machine)?;
        let ago = (now_s - past.at_s).max(0.0);
        let base = limits.machine_cooldown_s.max(past.lasted_s);
        let doubled = 2.0_f64.powi(past.count.saturating_sub(1).min(32) as i32);
        let rest = (base * doubled).min(limits.longest_machine_cooldown_s.max(base));
        if ago < rest {
            return Some(format!("moved {ago:.0} s ago (move {}), rests for {rest:.0} s", past.count));
        }
        (past.from_pool == pool && ago < limits.no_return_s)
            .then(|| format!("came from pool {pool} {ago:.0} s ago, no return within {:.0} s", limits.no_return_s))
    }

    /// Forgets machines that are gone.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.moves.retain(|machine, _| keep(machine));
        self.refused.retain(|machine, _| keep(machine));
    }
}

/// Why `machine` may not be moved at all, if so.
pub(crate) fn machine_obstacle(machine: &MachineView, cost: &Cost) -> Option<String> {
    if machine.migrating {
        return Some("is being migrated".to_owned());
    }
    if let Some(why) = &machine.pinned {
        return Some(format!("has to stay: {why}"));
    }
    let limit = machine.acceptable_downtime_ms;
    if cost.downtime_ms_p90 > limit {
        return Some(format!(
            "its downtime would reach {:.0} ms (90 %), {limit:.0} ms are accepted",
            cost.downtime_ms_p90
        ));
    }
    None
}

/// Why `machine` may not go to `host`, if so. `more` is what this plan already sends there.
pub(crate) fn host_obstacle(
    machine: &MachineView,
    host: &HostView,
    more: &PerResource<f64>,
    arriving: usize,
    limits: &PlanLimits,
) -> Option<String> {
    if let Some(why) = &host.closed {
        return Some(format!("takes no machine: {why}"));
    }
    if host.in_flight + arriving >= limits.in_flight_per_host {
        return Some(format!("{} migrations in flight there already", host.in_flight + arriving));
    }
    if !machine.cpu_profile.is_empty() && !host.cpu_profiles.contains(&machine.cpu_profile) {
        return Some(format!("cannot give CPU profile {}", machine.cpu_profile));
    }
    if let Some(other) = machine.apart_from.iter().find(|other| host.machines.contains(other)) {
        return Some(format!("runs {other}, which must stay apart"));
    }
    for resource in Resource::ALL {
        let (Some(capacity), Some(demand)) = (host.capacity[resource], &machine.demand[resource]) else { continue };
        let room = capacity * limits.target_use[resource];
        let wanted = host.expected_use[resource].unwrap_or(0.0) + more[resource] + demand.quantile(0.95);
        // What cannot be compared is not allowed either.
        if wanted.is_nan() || room.is_nan() || wanted > room {
            return Some(format!(
                "would use {} {resource} of {} allowed",
                resource.quantity(wanted),
                resource.quantity(room)
            ));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_rest_longer_with_every_move_and_do_not_go_back() {
        let limits = PlanLimits { machine_cooldown_s: 100.0, no_return_s: 1_000.0, ..PlanLimits::default() };
        let mut log = MoveLog::default();
        assert_eq!(log.forbids("m", "a", 0.0, &limits), None);
        log.note("m", "a", 0.0, 5.0, &limits);
        assert!(log.forbids("m", "c", 99.0, &limits).is_some());
        assert_eq!(log.forbids("m", "c", 101.0, &limits), None);
        assert!(log.forbids("m", "a", 999.0, &limits).is_some_and(|why| why.contains("no return")));
        assert_eq!(log.forbids("m", "a", 1_001.0, &limits), None);
        log.note("m", "b", 101.0, 5.0, &limits);
        assert!(log.forbids("m", "c", 101.0 + 199.0, &limits).is_some(), "200 s after the second move");
        assert_eq!(log.forbids("m", "c", 101.0 + 201.0, &limits), None);
        log.note("m", "b", 400.0, 500.0, &limits);
        assert!(log.forbids("m", "c", 400.0 + 1_900.0, &limits).is_some(), "a long migration makes a long rest");
    }

    #[test]
    fn a_refused_move_is_tried_elsewhere_at_once_and_there_after_a_while() {
        let mut log = MoveLog::default();
        log.refuse("m", "b1", 100.0, 60.0);
        assert!(log.refused("m", "b1", 130.0).is_some_and(|why| why.contains("30 s")));
        assert_eq!((log.refused("m", "b2", 130.0), log.refused("n", "b1", 130.0)), (None, None));
        assert_eq!(log.refused("m", "b1", 160.0), None);
        log.refuse("n", "b1", 200.0, 60.0);
        assert!(!log.refused.contains_key("m"), "what has passed is forgotten");
        assert_eq!(log.forbids("m", "b", 130.0, &PlanLimits::default()), None, "it has not moved");
    }

    #[test]
    fn hosts_are_refused_with_the_number_that_refuses() {
        let limits = PlanLimits::default();
        let machine = MachineView {
            name: "m".into(),
            demand: PerResource { cpu: Some(Forecast::certain(1, 2.0)), ..PerResource::default() },
            cpu_profile: "v3".into(),
            apart_from: vec!["twin".into()],
            ..MachineView::default()
        };
        let host = HostView {
            name: "b1".into(),
            capacity: PerResource { cpu: Some(4.0), ..PerResource::default() },
            expected_use: PerResource { cpu: Some(1.0), ..PerResource::default() },
            cpu_profiles: vec!["v3".into()],
            ..HostView::default()
        };
        let check = |host: &HostView| host_obstacle(&machine, host, &PerResource::default(), 0, &limits);
        assert_eq!(check(&host), None);
        let cases = [
            (HostView { in_flight: 1, ..host.clone() }, "in flight"),
            (HostView { cpu_profiles: vec![], ..host.clone() }, "CPU profile v3"),
            (HostView { machines: vec!["twin".into()], ..host.clone() }, "twin"),
            (HostView { closed: Some("draining".into()), ..host.clone() }, "draining"),
            (
                HostView { expected_use: PerResource { cpu: Some(1.7), ..PerResource::default() }, ..host.clone() },
                "3.70 cores cpu of 3.60 cores",
            ),
            (
                HostView {
                    expected_use: PerResource { cpu: Some(f64::NAN), ..PerResource::default() },
                    ..host.clone()
                },
                "would use",
            ),
        ];
        for (host, expected) in cases {
            let why = check(&host).unwrap_or_default();
            assert!(why.contains(expected), "{why:?} should name {expected:?}");
        }
    }
}
