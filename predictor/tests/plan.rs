//! From a pool that fills up to a plan, and what keeps a plan back.

mod common;

use common::{Noise, cpu_sample};
use predictor::{
    Contention, CostModel, Course, Forecast, HostView, MachineView, MigrationShape, MoveLog, PerResource, Plan,
    PlanInput, PlanLimits, PoolConfig, PoolForecaster, PoolView, Resource, Sample, Tick, plan,
};

const MIB: f64 = 1024.0 * 1024.0;
const WEIGHTS: PerResource<f64> = PerResource { cpu: 1.0, memory: 1.0, io: 0.7, network: 0.7 };

fn cores(cpu: f64) -> PerResource<Option<f64>> {
    PerResource { cpu: Some(cpu), ..PerResource::default() }
}

/// The contention of a pool of four cores whose machines take `start` cores and `slope` more each second.
fn contention(start: f64, slope: f64) -> Contention {
    let mut pool =
        PoolForecaster::new(PoolConfig { step_s: 1.0, horizon_steps: 30, ..PoolConfig::default() }).expect("sound");
    let mut noise = Noise::new(1);
    let mut last = None;
    for t in 0..60 {
        let total = start + slope * f64::from((t - 40).max(0)) + 0.03 * noise.normal();
        let samples: Vec<Sample> = (0..4).map(|i| cpu_sample(format!("vm{i}"), Some(total / 4.0))).collect();
        last = pool.tick(&Tick { now_s: f64::from(t), capacity: cores(4.0), samples: &samples, events: &[] }).ok();
    }
    last.expect("sixty ticks")
}

fn machine(name: &str, cpu: f64, memory_mib: f64, dirty_mib: f64) -> MachineView {
    MachineView {
        name: name.into(),
        host: "a1".into(),
        demand: PerResource { cpu: Some(Forecast::certain(30, cpu)), ..PerResource::default() },
        shape: MigrationShape {
            memory_bytes: memory_mib * MIB,
            dirty_bytes_per_second: dirty_mib * MIB,
            bandwidth_bytes_per_second: 500.0 * MIB,
            downtime_limit_ms: 50.0,
            ..MigrationShape::default()
        },
        acceptable_downtime_ms: 300.0,
        ..MachineView::default()
    }
}

fn host(name: &str, pool: &str, capacity: f64, used: f64) -> HostView {
    HostView {
        name: name.into(),
        pool: pool.into(),
        capacity: cores(capacity),
        expected_use: cores(used),
        ..HostView::default()
    }
}

struct Case {
    source: Contention,
    course: Course,
    machines: Vec<MachineView>,
    pools: Vec<PoolView>,
    hosts: Vec<HostView>,
    log: MoveLog,
    limits: PlanLimits,
    in_flight: usize,
}

impl Case {
    /// Pool a fills up; pool b has a host that is nearly idle.
    fn filling() -> Self {
        Self {
            source: contention(2.4, 0.05),
            course: Course::default(),
            machines: vec![
                machine("small", 0.05, 256.0, 0.0),
                machine("large", 1.5, 8192.0, 0.0),
                machine("right", 1.5, 512.0, 10.0),
            ],
            pools: vec![PoolView { name: "b".into(), contention: contention(0.8, 0.0), course: Course::default() }],
            hosts: vec![host("b1", "b", 4.0, 0.8)],
            log: MoveLog::default(),
            limits: PlanLimits::default(),
            in_flight: 0,
        }
    }

    fn plan(&self) -> Plan {
        plan(&PlanInput {
            now_s: 59.0,
            source_pool: "a",
            source: &self.source,
            course: &self.course,
            machines: &self.machines,
            pools: &self.pools,
            hosts: &self.hosts,
            weights: WEIGHTS,
            in_flight: self.in_flight,
            log: &self.log,
            cost: &CostModel::default(),
            limits: &self.limits,
        })
    }

    fn rejected_because(&self, machine: &str, part: &str) {
        let plan = self.plan();
        assert!(plan.moves.iter().all(|chosen| chosen.machine != machine), "{plan:?}");
        let found = plan.rejected.iter().any(|rejection| rejection.machine == machine && rejection.why.contains(part));
        assert!(found, "{machine} should be rejected with {part:?}: {:?}", plan.rejected);
    }
}

#[test]
fn moves_the_machine_that_relieves_most_for_its_bytes_before_contention() {
    let case = Case::filling();
    assert!(case.source.score > 0.5, "the case is one: {}", case.source.score);
    let plan = case.plan();
    assert_eq!(plan.moves.len(), 1, "{plan:?}");
    let chosen = &plan.moves[0];
    assert_eq!((chosen.machine.as_str(), chosen.to_host.as_str(), chosen.to_pool.as_str()), ("right", "b1", "b"));
    assert!(chosen.score_after < 0.5 * chosen.score_before, "{chosen:?}");
    assert!(chosen.benefit_minutes > 1.0 && chosen.harm_minutes < 0.1, "{chosen:?}");
    assert!(chosen.contention_at_s > 59.0 && chosen.contention_at_s <= 89.0, "{chosen:?}");
    assert!(chosen.latest_start_s < chosen.contention_at_s - chosen.cost.total_ms / 1000.0);
    for part in ["right", "a/a1", "b/b1", "cores", "score", "violation minutes", "downtime"] {
        assert!(chosen.explanation.contains(part), "{part:?} in {:?}", chosen.explanation);
    }
    let small = plan.rejected.iter().find(|rejection| rejection.machine == "small");
    assert!(small.is_none() || small.is_some_and(|rejection| rejection.why.contains("violation minutes")));
    assert_eq!(plan, case.plan(), "the same input, the same plan");
}

#[test]
fn a_calm_pool_needs_no_move() {
    let case = Case { source: contention(1.0, 0.0), ..Case::filling() };
    let plan = case.plan();
    assert!(plan.moves.is_empty());
    assert!(plan.explanation[0].contains("below the goal"), "{:?}", plan.explanation);
}

#[test]
fn hard_limits_hold() {
    let base = Case::filling;
    let only_right = |case: &mut Case| case.machines.retain(|machine| machine.name == "right");

    let mut case = base();
    case.machines[2].pinned = Some("host device".into());
    case.rejected_because("right", "host device");

    let mut case = base();
    case.machines[2].migrating = true;
    case.rejected_because("right", "being migrated");

    let mut case = base();
    case.machines[2].shape.dirty_bytes_per_second = 5_000.0 * MIB;
    case.rejected_because("right", "downtime");

    let mut case = base();
    case.hosts[0].expected_use = cores(3.0);
    case.rejected_because("right", "would use 4.50 cores");

    let mut case = base();
    case.pools[0].contention = contention(3.4, 0.0);
    case.rejected_because("right", "pool b would reach a score");

    let mut case = base();
    case.hosts[0].pool = "a".into();
    case.rejected_because("right", "relieves nothing");

    let mut case = base();
    case.log.note("right", "b", 50.0, 1.0, &case.limits);
    case.rejected_because("right", "rests");

    let mut case = base();
    case.log.note("right", "b", -2_000.0, 1.0, &case.limits);
    case.rejected_because("right", "no return");

    let mut case = base();
    only_right(&mut case);
    case.limits.minimum_benefit_minutes = 1e6;
    case.rejected_because("right", "net are asked for");

    let mut case = base();
    case.in_flight = case.limits.in_flight;
    let plan = case.plan();
    assert!(plan.moves.is_empty() && plan.explanation[0].contains("in flight"), "{plan:?}");
}

#[test]
fn several_moves_are_scored_one_after_the_other() {
    let mut case = Case::filling();
    case.source = contention(5.0, 0.0);
    case.machines = (0..4).map(|i| machine(&format!("vm{i}"), 0.7, 512.0, 0.0)).collect();
    case.hosts = vec![host("b1", "b", 4.0, 0.8), host("b2", "b", 4.0, 0.8)];
    case.pools[0].contention = {
        // Pool b has eight cores.
        let mut calm = contention(0.8, 0.0);
        if let Some(cpu) = &mut calm.resources.cpu {
            cpu.capacity = 8.0;
            cpu.limit = 7.6;
        }
        calm
    };
    case.limits.moves = 3;
    case.limits.in_flight = 3;
    let plan = case.plan();
    assert_eq!(plan.moves.len(), 2, "two moves are enough: {:?}", plan.explanation);
    assert_ne!(plan.moves[0].to_host, plan.moves[1].to_host, "one arrival at a time");
    assert!(plan.moves[1].score_before <= plan.moves[0].score_before);
    assert!(plan.moves[1].score_after < case.limits.goal);
}

#[test]
fn it_is_said_when_it_is_too_late_and_when_nothing_is_possible() {
    let mut case = Case::filling();
    case.source = contention(4.2, 0.0);
    let plan = case.plan();
    assert!(plan.moves[0].latest_start_s < 59.0 && plan.moves[0].explanation.contains("too late"), "{plan:?}");
    case.hosts.clear();
    let plan = case.plan();
    assert!(plan.explanation[0].contains("no machine or no host"), "{:?}", plan.explanation);
    case.machines.clear();
    assert!(case.plan().moves.is_empty());
}

#[test]
fn numbers_that_are_none_do_not_make_a_plan() {
    let mut case = Case::filling();
    for machine in &mut case.machines {
        machine.demand.cpu = Some(Forecast::certain(30, f64::NAN));
        machine.shape.memory_bytes = f64::NAN;
    }
    assert!(case.plan().moves.is_empty());
    assert!(Resource::ALL.len() == 4);
}

/// Six machines with jumps of their own, over 240 seconds; pool b has as much again that goes on quietly.
fn jumping(seed: u64) -> (Vec<Course>, Course) {
    let mut noise = Noise::new(seed);
    let mut machines = Vec::new();
    for _ in 0..6 {
        let (calm, jump) = (0.2 + 0.2 * noise.uniform(), 1.5 * noise.uniform());
        let (every, lasts) = (20 + (40.0 * noise.uniform()) as usize, 5 + (10.0 * noise.uniform()) as usize);
        let offset = (60.0 * noise.uniform()) as usize;
        let value = |t: usize| calm + if (t + offset) % every < lasts { jump } else { 0.0 };
        let recent = PerResource { cpu: (0..240).map(|t| value(t) as f32).collect(), ..PerResource::default() };
        machines.push(Course { step_s: 1.0, recent, events: Vec::new() });
    }
    let level = 1.0 + noise.uniform();
    let recent =
        PerResource { cpu: (0..240).map(|t| level as f32 + 0.01 * (t % 3) as f32).collect(), ..PerResource::default() };
    (machines, Course { step_s: 1.0, recent, events: Vec::new() })
}

#[test]
fn greedy_moves_come_near_the_best_of_all_plans() {
    let (mut greedy_sum, mut exact_sum, mut cases) = (0.0, 0.0, 0);
    for seed in 1..90 {
        let (courses, target) = jumping(seed);
        let names: Vec<String> = (0..courses.len()).map(|number| format!("vm{number}")).collect();
        let source = courses.iter().skip(1).fold(courses[0].clone(), |sum, course| sum.with(course));
        // What has seldom stood so high is judged by its forecast as well, and the forecasts here are made up: with twenty older
        // moments as high it counts for less than a twentieth.
        let sums = &source.recent.cpu;
        if sums[..210].iter().filter(|sum| *sum >= &sums[239]).count() < 20 {
            continue;
        }
        let mut case = Case::filling();
        case.source = contention(0.1, 0.0);
        case.machines = names.iter().map(|name| machine(name, 0.3, 256.0, 0.0)).collect();
        for (view, course) in case.machines.iter_mut().zip(&courses) {
            view.course = course.clone();
        }
        case.course = source.clone();
        case.pools[0].course = target.clone();
        case.hosts[0].capacity = PerResource::default();
        case.limits = PlanLimits {
            goal: 0.0,
            moves: 3,
            in_flight: 9,
            in_flight_per_host: 9,
            target_score: 1.0,
            minimum_benefit_minutes: 0.001,
            ..PlanLimits::default()
        };
        let from_s = CostModel::default().predict(&case.machines[0].shape).total_ms / 1000.0;
        let left = |moved: &dyn Fn(usize) -> bool| {
            let chosen = || (0..6).filter(|number| moved(*number));
            let here = chosen().fold(source.clone(), |sum, number| sum.without(&names[number], &courses[number]));
            let there = chosen().fold(target.clone(), |sum, number| sum.with(&courses[number]));
            let minutes = |course: &Course| course.minutes(Resource::Cpu, 3.8, from_s, 30.0).expect("long enough");
            minutes(&here) + minutes(&there)
        };
        let none = left(&|_| false);
        let sets = (0..64_u32).filter(|set| set.count_ones() <= 3);
        let exact = none - sets.map(|set| left(&|number| set >> number & 1 == 1)).fold(f64::MAX, f64::min);
        let plan = case.plan();
        let taken = |number: usize| plan.moves.iter().any(|chosen| chosen.machine == names[number]);
        let greedy = none - left(&taken);
        assert!(greedy >= -1e-9 && greedy <= exact + 1e-9, "seed {seed}: {greedy} of {exact}");
        if let Some(first) = plan.moves.first() {
            let best = (0..6).map(|one| none - left(&|number| number == one)).fold(0.0, f64::max);
            let one = names.iter().position(|name| *name == first.machine);
            let net = none - left(&|number| Some(number) == one);
            assert!(net >= 0.8 * best - 1e-9, "seed {seed}: the first avoids {net} of {best}");
        }
        if exact > 0.01 {
            (greedy_sum, exact_sum, cases) = (greedy_sum + greedy, exact_sum + exact, cases + 1);
            assert!(greedy >= 0.5 * exact, "seed {seed}: {greedy} of {exact}");
        }
    }
    assert!(cases > 20, "{cases} cases have something to avoid");
    assert!(greedy_sum > 0.9 * exact_sum, "{greedy_sum} of {exact_sum} over {cases} cases");
}

/// Two pools of two machines each, forecast at every step up to `steps`; `load` is what machine `vm0` of pool `a` uses, beside another
/// one of a core. Each pool has four cores. Returns the plan for pool `a`, whose `vm0` and `vm1` may go to pool `b`.
fn planned(steps: usize, load: impl Fn(usize) -> f64) -> (Contention, Plan) {
    let config = PoolConfig { step_s: 1.0, horizon_steps: 30, ..PoolConfig::default() };
    let mut pools = [0, 1].map(|_| PoolForecaster::new(config.clone()).expect("sound"));
    let mut noise = Noise::new(3);
    let mut contentions = Vec::new();
    for t in 0..steps {
        let mut near = |value: f64| Some(value + 0.02 * noise.normal());
        let samples = [
            vec![cpu_sample("vm0", near(load(t))), cpu_sample("vm1", near(1.0))],
            vec![cpu_sample("vm8", near(0.5)), cpu_sample("vm9", near(0.5))],
        ];
        let tick = |pool: usize| Tick { now_s: t as f64, capacity: cores(4.0), samples: &samples[pool], events: &[] };
        contentions = [0, 1].map(|pool| pools[pool].tick(&tick(pool)).expect("sound")).to_vec();
    }
    let view = |name: &str| MachineView {
        demand: PerResource { cpu: pools[0].machine_forecast(name, Resource::Cpu, 30), ..PerResource::default() },
        course: pools[0].machine_course(name).expect("a member"),
        ..machine(name, 0.0, 256.0, 0.0)
    };
    let source = contentions[0].clone();
    let case = Case {
        source: source.clone(),
        course: pools[0].course(),
        machines: vec![view("vm0"), view("vm1")],
        pools: vec![PoolView { name: "b".into(), contention: contentions[1].clone(), course: pools[1].course() }],
        hosts: vec![host("b1", "b", 4.0, 1.0)],
        limits: PlanLimits { goal: 0.0, ..PlanLimits::default() },
        ..Case::filling()
    };
    (source, case.plan())
}

#[test]
fn a_climb_that_was_never_seen_is_a_reason_to_act() {
    // Flat for six hundred seconds, then 0.04 cores more each second: 3.8 are exceeded in about 20.
    let (source, plan) = planned(645, |t| 1.0 + 0.04 * t.saturating_sub(600) as f64);
    assert!(source.score > 0.5, "{}", source.score);
    let chosen = plan.moves.first().unwrap_or_else(|| panic!("a move: {plan:?}"));
    assert!(chosen.benefit_minutes > 0.1 && chosen.score_after < 0.5 * chosen.score_before, "{chosen:?}");
}

#[test]
fn a_pattern_that_repeats_is_judged_by_its_past() {
    // Every hundred seconds `vm0` takes three cores for twenty; five of them are over.
    let pattern = |t: usize| if t % 100 >= 80 { 3.0 } else { 1.0 };
    let (_, within) = planned(1_585, pattern);
    let chosen = within.moves.first().unwrap_or_else(|| panic!("a move: {within:?}"));
    // What is left of the peak, less the time of the move: a forecast alone takes it to last through the horizon and beyond.
    assert!((0.05..0.6).contains(&chosen.benefit_minutes), "{}", chosen.benefit_minutes);
    // The same peak where it never comes down: as much as the horizon and what follows.
    let (_, for_good) = planned(1_585, |t| if t >= 1_580 { 3.0 } else { 1.0 });
    let beyond = for_good.moves.first().map_or(0.0, |chosen| chosen.benefit_minutes);
    assert!(beyond > 2.0 * chosen.benefit_minutes, "{beyond} against {}", chosen.benefit_minutes);
}
