//! The course of the demo.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use migration::report::Report;

use super::feed::{Feed, View};
use super::load::{self, Load};
use super::observer::{Observer, TcpSummary, UdpSummary};
use super::promise::{self, Findings, Oracle};
use super::reactive::{Demand, Threshold, replay};
use super::report::{DemoReport, ReactiveReport};
use super::screen::{Scene, Screen};
use super::story::Story;
use super::{DemoError, scenario, stage};
use crate::api::types::Migration;
use crate::lab::{Lab, interrupt};

/// Requests and TCP messages a second to the machine that is moved.
const CLOSE_UDP: u32 = 1000;
const CLOSE_TCP: u32 = 100;

/// How often the picture is drawn.
const FRAME: Duration = Duration::from_millis(FRAME_MS);
const FRAME_MS: u64 = 250;

/// How long the observer keeps looking closely after the migration, before its window ends.
const AFTER_MS: u64 = 1500;

/// A migration that is still under way at the end of the scenario may take so much longer.
const OVERTIME_S: f64 = 40.0;

/// How long outstanding echoes may take at the end.
const ECHO_DEADLINE: Duration = Duration::from_secs(3);

/// Since when a machine is watched closely.
#[derive(Clone, Debug)]
struct Watch {
    machine: String,
    since_ns: u64,
    since_unix_ms: u64,
}

/// Everything that runs while the load is on.
struct Play {
    started: Instant,
    origin: Instant,
    lab: Lab,
    observer: Arc<Observer>,
    feed: Feed,
    load: Load,
    watch: Arc<Mutex<Option<Watch>>>,
    story: Story,
    event_declared: bool,
    relaxed: bool,
}

/// Runs the demo to its end.
///
/// # Errors
/// [`DemoError`], with nothing left behind.
pub fn run(screen: &mut Screen) -> Result<DemoReport, DemoError> {
    let started = Instant::now();
    interrupt::install()?;
    preflight()?;
    let mut story = Story::default();
    let lab = stage::build(&mut story, |story, phase| {
        let scene = Scene { phase: phase.to_owned(), happenings: story.happenings.clone(), ..Scene::default() };
        screen.show(&scene);
    })?;
    let mut play = Play::start(started, lab, story)?;
    play.perform(screen)?;
    play.finish(screen)
}

fn preflight() -> Result<(), DemoError> {
    let path = Path::new("/dev/kvm");
    std::fs::File::options().read(true).write(true).open(path).map_err(DemoError::Kvm)?;
    // Before anything is made, so that a missing program is told at once.
    crate::lab::binary("hostd")?;
    crate::lab::binary("headroom-vmm")?;
    Ok(())
}

impl Play {
    fn start(started: Instant, lab: Lab, story: Story) -> Result<Self, DemoError> {
        let observer = Arc::new(stage::observe(&lab)?);
        let origin = Instant::now();
        let watch = Arc::new(Mutex::new(None));
        let feed = Feed::start(&lab, origin, {
            let (observer, watch) = (Arc::clone(&observer), Arc::clone(&watch));
            move |migration: &Migration| begin_watch(&observer, &watch, migration)
        })?;
        let load = Load::start(lab.observer(), origin)?;
        Ok(Self { started, origin, lab, observer, feed, load, watch, story, event_declared: false, relaxed: false })
    }

    fn at_s(&self) -> f64 {
        self.origin.elapsed().as_secs_f64()
    }

    fn perform(&mut self, screen: &mut Screen) -> Result<(), DemoError> {
        let mut next = Instant::now();
        loop {
            let (at_s, view) = (self.at_s(), self.feed.view());
            let moving = view.migrations.iter().any(|migration| !migration.stage.ended());
            if at_s >= scenario::END_S && (!moving || at_s >= scenario::END_S + OVERTIME_S) {
                return Ok(());
            }
            if at_s >= scenario::DECLARE_S && !self.event_declared {
                self.declare()?;
            }
            self.relax(&view);
            self.story.follow(at_s, &view);
            screen.show(&self.scene(at_s, view));
            next += FRAME;
            interrupt::wait_until(next)?;
        }
    }

    fn declare(&mut self) -> Result<(), DemoError> {
        let leader = self.lab.hosts().iter().find(|host| host.pool() == scenario::BUSY_POOL);
        let client = leader.ok_or(crate::lab::LabError::UnknownHost(scenario::BUSY_POOL.into()))?.client();
        let event = scenario::event();
        stage::block_on("declaring the event", Duration::from_secs(5), client.add_event(&event))?;
        self.event_declared = true;
        let text = format!(
            "declared: {} in pool {}, +{:.2} cores in {:.0} s",
            event.name,
            scenario::BUSY_POOL,
            event.adds.cpu_cores,
            event.starts_in_s.unwrap_or_default()
        );
        self.story.tell(self.at_s(), text);
        Ok(())
    }

    /// After the window of the close watch the machine is asked as lightly as before: 1,000 answers a second are a load,
    /// and the record of the demand is not to be the observer's work.
    fn relax(&mut self, view: &View) {
        let ended = view.migration().and_then(|migration| migration.ended_unix_ms);
        let over = ended.is_some_and(|ended| unix_ms() > ended + AFTER_MS + FRAME_MS);
        if let Some(watch) = self.watch().filter(|_| over && !self.relaxed) {
            self.relaxed = true;
            self.observer.set_rates(&watch.machine, stage::LIGHT_UDP, stage::LIGHT_TCP);
        }
    }

    fn watch(&self) -> Option<Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn scene(&self, at_s: f64, view: View) -> Scene {
        let statuses = self.load.statuses();
        let watch = self.watch();
        let phase = match at_s {
            at_s if at_s < scenario::DECLARE_S => "two pools, everything is quiet",
            at_s if at_s < scenario::EVENT_S => "the load of pool a grows",
            _ => "the event that was declared is running",
        };
        Scene {
            at_s,
            phase: phase.to_owned(),
            udp: watch.as_ref().and_then(|watch| self.udp_of(watch, view.migrations.last())),
            tcp: watch.as_ref().and_then(|watch| self.observer.tcp(&watch.machine)),
            observed: watch.map(|watch| watch.machine),
            guest_errors: statuses.values().map(|status| status.sweep_errors + status.disk_errors).sum(),
            guests: statuses.len(),
            view,
            happenings: self.story.happenings.clone(),
        }
    }

    /// What the observer saw from the start of the close watch until a while after the migration.
    fn udp_of(&self, watch: &Watch, migration: Option<&Migration>) -> Option<UdpSummary> {
        let ended = migration.and_then(|migration| migration.ended_unix_ms);
        let end = ended.map_or(u64::MAX, |ended| {
            watch.since_ns + (ended + AFTER_MS).saturating_sub(watch.since_unix_ms).saturating_mul(1_000_000)
        });
        let mut udp = self.observer.udp(&watch.machine, watch.since_ns..end)?;
        let report = migration.and_then(|migration| migration.report.as_ref());
        udp.downtime_gap_ms = report.and_then(|report| {
            let since_pause_ms = report.paused_unix_ms? - watch.since_unix_ms as f64;
            let start = watch.since_ns + (since_pause_ms.max(0.0) * 1e6) as u64;
            let end = start + (report.downtime_ms.total * 1e6) as u64;
            self.observer.silence_over(&watch.machine, &(start..end))
        });
        Some(udp)
    }

    /// Stops the load, asks everybody once more, takes everything down and sums up.
    fn finish(mut self, screen: &mut Screen) -> Result<DemoReport, DemoError> {
        let view = self.feed.view();
        let watch = self.watch();
        let udp = watch.as_ref().and_then(|watch| self.udp_of(watch, view.migration()));
        let tcp = watch.as_ref().and_then(|watch| self.last_echoes(&watch.machine));
        let oracles = oracles(&load::final_statuses(self.lab.observer())?);
        self.story.tell(self.at_s(), "removes machines, hosts and networks");
        screen.show(&self.scene(self.at_s(), view.clone()));
        let quota_reason = self.lab.unlimited().map(str::to_owned);
        let hosts = self.lab.hosts().len();
        let Self { started, origin, lab, observer, feed, load, .. } = self;
        drop((feed, load, observer));
        let leftovers = stage::take_down(lab);
        let findings = Findings { udp, tcp, oracles, leftovers, ..Findings::default() };
        let mut report = summarize(view, watch.as_ref(), findings, origin_unix_ms(origin));
        report.quota_enforced = quota_reason.is_none();
        report.quota_reason = quota_reason;
        report.hosts = hosts;
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }

    /// Sends no more and waits for what is outstanding.
    fn last_echoes(&self, machine: &str) -> Option<TcpSummary> {
        self.observer.set_rates(machine, 0, 0);
        let done = interrupt::poll("the last echoes", ECHO_DEADLINE, Duration::from_millis(20), || {
            Ok(self.observer.tcp(machine).filter(TcpSummary::complete))
        });
        // What did not come in time is seen in the summary.
        done.ok().or_else(|| self.observer.tcp(machine))
    }
}

/// The first machine that leaves the busy pool is watched closely from here on.
fn begin_watch(observer: &Observer, watch: &Mutex<Option<Watch>>, migration: &Migration) {
    let mut watch = watch.lock().unwrap_or_else(PoisonError::into_inner);
    if watch.is_none() {
        let since_ns = observer.set_rates(&migration.machine, CLOSE_UDP, CLOSE_TCP);
        *watch = Some(Watch { machine: migration.machine.clone(), since_ns, since_unix_ms: unix_ms() });
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn origin_unix_ms(origin: Instant) -> u64 {
    unix_ms().saturating_sub(u64::try_from(origin.elapsed().as_millis()).unwrap_or(u64::MAX))
}

fn oracles(statuses: &std::collections::BTreeMap<&'static str, headroom_guest::Status>) -> Vec<Oracle> {
    let oracle = |name: &'static str| match statuses.get(name) {
        None => Oracle { machine: name.to_owned(), ..Oracle::default() },
        Some(status) => Oracle {
            machine: name.to_owned(),
            answered: true,
            sweep_pages_checked: status.sweep_pages_checked,
            sweep_errors: status.sweep_errors,
            disk_blocks_checked: status.disk_blocks_checked,
            disk_errors: status.disk_errors,
        },
    };
    scenario::machines().into_iter().map(|machine| oracle(machine.name)).collect()
}

/// Puts everything together.
fn summarize(view: View, watch: Option<&Watch>, mut findings: Findings, origin_unix_ms: u64) -> DemoReport {
    let capacity_cores = view.pool(scenario::BUSY_POOL).map_or(0.0, |pool| pool.capacity.cpu_cores);
    let moved = view.migration().cloned();
    let with_gap = |mut report: Report| {
        if moved.as_ref().is_some_and(|moved| moved.id == report.id) {
            report.network_gap_ms = findings.udp.as_ref().map(|udp| udp.gap_ms);
        }
        report
    };
    let migrations: Vec<Report> =
        view.migrations.iter().rev().filter_map(|migration| migration.report.clone().map(with_gap)).collect();
    let migration = moved.as_ref().and_then(|moved| migrations.iter().find(|report| report.id == moved.id).cloned());
    let ended = moved.as_ref().and_then(|moved| moved.ended_unix_ms);
    let migrated_at_s = ended.map(|ended| ended.saturating_sub(origin_unix_ms) as f64 / 1e3);
    let threshold = Threshold::default();
    let migration_s = migration.as_ref().map_or(0.0, |report| report.total_ms / 1e3);
    let replay = replay(&view.demand, capacity_cores, threshold, migration_s);
    findings.lead_s = replay.contention_at_s.zip(migrated_at_s).map(|(full, done)| full - done);
    findings.watched_throughout = match (watch, &migration) {
        (Some(watch), Some(report)) => watched_before_stop(watch, report),
        _ => false,
    };
    findings.report.clone_from(&migration);
    let promises = promise::check(&findings);
    DemoReport {
        version: env!("CARGO_PKG_VERSION"),
        ok: promises.iter().all(|promise| promise.kept),
        seconds: 0.0,
        hosts: 0,
        machines: scenario::machines().len(),
        capacity_cores,
        quota_enforced: true,
        quota_reason: None,
        plan: moved.as_ref().and_then(|moved| view.plan_of(&moved.id)).cloned(),
        plans: view.plans.iter().rev().cloned().collect(),
        migration,
        migrations,
        migrated_at_s,
        lead_time_s: findings.lead_s,
        udp: findings.udp,
        tcp: findings.tcp,
        oracles: findings.oracles,
        reactive: ReactiveReport { threshold, migration_s, replay },
        peak_share: peak(&view.load) / capacity_cores.max(1e-9),
        demand: view.demand,
        load: view.load,
        promises,
    }
}

/// Whether the close watch had begun, by a tenth of a second at least, when the machine was stopped.
fn watched_before_stop(watch: &Watch, report: &Report) -> bool {
    let stopped = report.paused_unix_ms.unwrap_or_default();
    watch.machine == report.machine && watch.since_unix_ms as f64 + 100.0 <= stopped
}

fn peak(load: &[Demand]) -> f64 {
    load.iter().map(|sample| sample.cores).fold(0.0, f64::max)
}
