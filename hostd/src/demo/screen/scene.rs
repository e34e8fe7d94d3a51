//! One picture: pools, forecast, score, plan, migration and observer. A pure function of what is known.

use vmm::api::Phase;

use super::super::feed::View;
use super::super::observer::{TcpSummary, UdpSummary};
use super::super::scenario;
use super::{COLUMNS, Line, Style};
use crate::api::types::{HostSummary, Migration, MigrationStage, PlanOutcome, PoolView, Resource, TriggerState};

/// Happenings that are shown.
const HAPPENINGS: usize = 7;

/// Something worth a line in the log.
#[derive(Clone, Debug, PartialEq)]
pub struct Happening {
    /// Seconds since the start of the load; negative before.
    pub at_s: f64,
    /// What.
    pub text: String,
}

impl Happening {
    /// As a line.
    pub fn line(&self) -> Line {
        let time = if self.at_s < 0.0 { "  set-up   ".to_owned() } else { format!(" {:>6.1} s  ", self.at_s) };
        Line::new().add(Style::Dim, time).text(self.text.clone())
    }
}

/// Everything that is shown.
#[derive(Clone, Debug, Default)]
pub struct Scene {
    /// Seconds since the start of the load.
    pub at_s: f64,
    /// What the demo is doing.
    pub phase: String,
    /// What the daemons say.
    pub view: View,
    /// The machine under close observation.
    pub observed: Option<String>,
    /// What the observer sees of it.
    pub udp: Option<UdpSummary>,
    /// Its TCP connection.
    pub tcp: Option<TcpSummary>,
    /// Errors that the guests have found in their memory and disks.
    pub guest_errors: u64,
    /// Guests that have answered.
    pub guests: usize,
    /// The log.
    pub happenings: Vec<Happening>,
}

impl Scene {
    /// The picture, no line wider than [`COLUMNS`], with as many of the newest happenings as fit into `rows`.
    pub fn lines(&self, rows: usize) -> Vec<Line> {
        let mut lines = vec![self.title(), rule()];
        for pool in &self.view.pools {
            lines.extend(pool_lines(pool));
        }
        lines.push(rule());
        lines.push(self.event());
        lines.extend(self.migration());
        lines.push(self.observer());
        lines.push(rule());
        let first = self.happenings.len().saturating_sub(HAPPENINGS);
        let told = self.happenings[first..].iter().map(|happening| happening.line().wrapped(COLUMNS, 11));
        let told: Vec<Vec<Line>> = told.collect();
        // Whole happenings, the newest at the end: half a sentence at the top would puzzle.
        let room = rows.saturating_sub(lines.len());
        let mut used = 0;
        let fits = |happening: &&Vec<Line>| {
            used += happening.len();
            used <= room
        };
        let shown = told.iter().rev().take_while(fits).count();
        lines.extend(told[told.len() - shown..].iter().flatten().cloned());
        lines
    }

    /// The same in one line, for a log.
    pub fn plain_line(&self) -> String {
        let mut text = format!("{:>6.1} s ", self.at_s);
        for pool in &self.view.pools {
            let score = pool.score.map_or("-".to_owned(), |score| format!("{score:.2}"));
            text += &format!(
                " | {} cpu {:.2}/{:.2} score {score} {}",
                pool.pool,
                pool.usage.cpu_cores,
                pool.capacity.cpu_cores,
                trigger_word(pool.trigger.state)
            );
        }
        if let Some(migration) = self.view.migration() {
            text += &format!(" | {} -> {} {}", migration.machine, migration.destination, progress_in_words(migration));
        }
        if let (Some(machine), Some(udp)) = (&self.observed, &self.udp) {
            text += &format!(" | {machine} gap {:.1} ms lost {}", udp.gap_ms, udp.lost);
        }
        text
    }

    fn title(&self) -> Line {
        let clock = format!("{:5.1} s", self.at_s.max(0.0));
        let left = format!(" Headroom demo   {}", self.phase);
        let space = COLUMNS.saturating_sub(left.chars().count() + clock.len() + 1);
        Line::new().add(Style::Bold, left).text(" ".repeat(space)).add(Style::Bold, clock)
    }

    fn event(&self) -> Line {
        let line = Line::new().add(Style::Dim, " event    ");
        let Some(event) = self.view.events.first() else { return line.add(Style::Dim, "none declared") };
        let until = scenario::EVENT_S - self.at_s;
        let when = if until > 0.0 { format!("in {until:.0} s") } else { "is running".to_owned() };
        let pool = scenario::BUSY_POOL;
        line.text(format!("{} in pool {pool}: +{:.2} cores ", event.name, event.adds.cpu_cores))
            .add(Style::Accent, when)
    }

    fn migration(&self) -> Vec<Line> {
        let Some(migration) = self.view.migration() else {
            return vec![self.planned(), Line::new()];
        };
        let head = format!("{} {} -> {}  ", migration.machine, migration.source, migration.destination);
        let line = Line::new().add(Style::Dim, " move     ").add(Style::Bold, head);
        vec![line.add(stage_style(migration.stage), progress_in_words(migration)), progress_bar(migration)]
    }

    /// A move that waits for its latest safe start, if there is one.
    fn planned(&self) -> Line {
        let line = Line::new().add(Style::Dim, " move     ");
        let waits = self.view.plans.iter().find(|plan| plan.outcome == PlanOutcome::Waiting);
        let Some((plan, machine)) = waits.and_then(|plan| Some((plan, plan.machine.as_ref()?))) else {
            return line.add(Style::Dim, "none yet");
        };
        let pool = self.view.pool(&plan.pool);
        let left = pool.and_then(|pool| {
            let latest = pool.trigger.latest_start_unix_ms?;
            Some(format!(
                ", starts in {:.0} s at the latest",
                latest.saturating_sub(pool.computed_unix_ms) as f64 / 1e3
            ))
        });
        let (from, to) = (plan.source.as_deref().unwrap_or("?"), plan.destination.as_deref().unwrap_or("?"));
        line.add(Style::Bold, format!("{machine} {from} -> {to}  "))
            .add(Style::Accent, format!("planned{}", left.unwrap_or_default()))
    }

    fn observer(&self) -> Line {
        let line = Line::new().add(Style::Dim, " outside  ");
        let (Some(machine), Some(udp)) = (&self.observed, &self.udp) else {
            return line.add(Style::Dim, format!("{} guests answer, {} errors found", self.guests, self.guest_errors));
        };
        let gap = if udp.gap_ms <= super::super::promise::GAP_MS_MAX { Style::Good } else { Style::Bad };
        let line = line
            .text(format!("{machine} 1,000/s  gap "))
            .add(gap, format!("{:.1} ms", udp.gap_ms))
            .text(format!("  lost {}  rtt {:.2} ms  ", udp.lost, udp.rtt_p50_us / 1e3));
        match &self.tcp {
            Some(tcp) if tcp.alive() => line.add(Style::Good, format!("TCP alive, {} bytes", tcp.bytes_echoed)),
            Some(_) => line.add(Style::Bad, "TCP broken"),
            None => line,
        }
    }
}

fn rule() -> Line {
    Line::new().add(Style::Dim, "─".repeat(COLUMNS))
}

fn pool_lines(pool: &PoolView) -> Vec<Line> {
    let (used, capacity) = (pool.usage.cpu_cores, pool.capacity.cpu_cores);
    let share = used / capacity.max(1e-9);
    let high = forecast(pool).map(|(_, high)| high / capacity.max(1e-9));
    let mut lines = vec![
        Line::new()
            .add(Style::Bold, format!(" pool {}   ", pool.pool))
            .bar(30, share, high)
            .text(format!("  {used:.2} of {capacity:.2} cores"))
            .add(Style::Dim, format!("  {:.0} %", share * 100.0)),
        score_line(pool),
    ];
    lines.extend(pool.hosts.iter().map(host_line));
    lines
}

fn score_line(pool: &PoolView) -> Line {
    let line = Line::new().add(Style::Dim, "          ");
    let Some(score) = pool.score else { return line.add(Style::Dim, "forecast needs more samples") };
    let line = match forecast(pool) {
        Some((median, high)) => line.text(format!("in {:.0} s {median:.2}, at most {high:.2} ", pool.horizon_s)),
        None => line,
    };
    let style = if score >= pool.trigger.start_score { Style::Bad } else { Style::Good };
    let line = line.text(" score ").add(style, format!("{score:.2} {}", trigger_word(pool.trigger.state)));
    match pool.expected_contention_s {
        Some(seconds) => line.add(Style::Warn, format!("  full in about {seconds:.0} s")),
        None => line,
    }
}

/// Median and highest known quantile of the pool's processor load at the longest horizon.
fn forecast(pool: &PoolView) -> Option<(f64, f64)> {
    let cpu = pool.forecasts.iter().filter(|forecast| forecast.resource == Resource::Cpu);
    let longest = cpu.max_by(|one, other| one.horizon_s.total_cmp(&other.horizon_s))?;
    let median = longest
        .quantiles
        .iter()
        .min_by(|one, other| (one.probability - 0.5).abs().total_cmp(&(other.probability - 0.5).abs()))?;
    Some((median.value, longest.quantiles.last()?.value))
}

fn host_line(host: &HostSummary) -> Line {
    let (used, capacity) = (host.usage.unwrap_or_default().cpu_cores, host.capacity.cpu_cores);
    let mut line = Line::new()
        .text(format!("   {:<6} ", host.host))
        .bar(14, used / capacity.max(1e-9), None)
        .text(format!(" {used:.2}/{capacity:.2} "));
    if !host.live {
        line = line.add(Style::Bad, " does not answer");
    }
    for machine in &host.machines {
        let cores = machine.usage.map_or("-".to_owned(), |usage| format!("{:.2}", usage.cpu_cores));
        let text = format!(" {} {cores}", machine.name);
        if line.width() + text.chars().count() > COLUMNS {
            return line.add(Style::Dim, "…");
        }
        line = line.add(Style::Accent, text);
    }
    line
}

fn trigger_word(state: TriggerState) -> &'static str {
    match state {
        TriggerState::Quiet => "quiet",
        TriggerState::Rising => "rising",
        TriggerState::Firing => "firing",
        TriggerState::Planned => "planned",
        TriggerState::Cooldown => "cooldown",
    }
}

fn stage_style(stage: MigrationStage) -> Style {
    match stage {
        MigrationStage::Completed => Style::Good,
        MigrationStage::Failed | MigrationStage::Cancelled | MigrationStage::Lost => Style::Bad,
        _ => Style::Accent,
    }
}

fn progress_in_words(migration: &Migration) -> String {
    let stage = match migration.stage {
        MigrationStage::Queued => "waits for its turn",
        MigrationStage::Reserving => "reserves room",
        MigrationStage::Settling => "asks which side runs it",
        MigrationStage::Verifying => "arrived, not yet verified,",
        MigrationStage::Completed => "arrived and verified",
        MigrationStage::Retrying => "failed, is tried again",
        MigrationStage::Lost => "lost in post-copy",
        MigrationStage::Failed => "failed",
        MigrationStage::Cancelled => "cancelled",
        MigrationStage::Transferring => return transfer_in_words(migration),
    };
    match (&migration.error, &migration.report) {
        (Some(error), _) => format!("{stage}: {error}"),
        (None, Some(report)) => {
            format!("{stage} in {:.2} s, down {:.1} ms", report.total_ms / 1e3, report.downtime_ms.total)
        }
        (None, None) => stage.to_owned(),
    }
}

fn transfer_in_words(migration: &Migration) -> String {
    let Some(progress) = &migration.progress else { return "connects".to_owned() };
    let phase = match progress.phase {
        Phase::Handshake => "handshake".to_owned(),
        Phase::Precopy => format!("pre-copy, round {}", progress.round),
        Phase::Switchover => "switchover".to_owned(),
        Phase::Committed => "committed".to_owned(),
        Phase::Postcopy => "post-copy".to_owned(),
        Phase::Verify => "verifying".to_owned(),
        Phase::Ended => "ended".to_owned(),
    };
    let remaining = progress.expected_remaining_ms.map_or(String::new(), |ms| format!(", {:.1} s left", ms / 1e3));
    format!("{phase}, {:.0} MB/s{remaining}", progress.bytes_per_second / 1e6)
}

fn progress_bar(migration: &Migration) -> Line {
    let Some(progress) = migration.progress.as_ref().filter(|_| !migration.stage.ended()) else { return Line::new() };
    let (done, left) = (progress.bytes_done as f64, progress.bytes_remaining as f64);
    let share = if done + left > 0.0 { done / (done + left) } else { 0.0 };
    let line = Line::new().text("          ");
    // Not a load: full is good here.
    let cells = (0..40).map(|cell| if f64::from(cell) < share * 40.0 { '█' } else { '░' }).collect::<String>();
    line.add(Style::Accent, cells).text(format!(" {:.1} MB, {:.1} MB left", done / 1e6, left / 1e6))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::{Capacity, MachineStatus, MachineSummary, TriggerView, Usage};

    fn pool(machines: usize) -> PoolView {
        let capacity = Capacity { cpu_cores: 1.2, ..Capacity::default() };
        let usage = Usage { cpu_cores: 0.9, ..Usage::default() };
        let machine = |number: usize| MachineSummary {
            name: format!("a-rather-long-name-{number}"),
            status: MachineStatus::Running,
            vcpus: 1,
            memory_mib: 64,
            disk_bytes: 0,
            disk_allocated_bytes: 0,
            limits: Default::default(),
            usage: Some(usage),
            dirty: None,
        };
        let host = HostSummary {
            host: "a1".into(),
            live: true,
            draining: false,
            capacity,
            usage: Some(usage),
            machines: (0..machines).map(machine).collect(),
            sampled_unix_ms: 1,
        };
        PoolView {
            pool: "a".into(),
            leader: Some("a1".into()),
            hosts: vec![host],
            capacity,
            usage,
            forecasts: Vec::new(),
            scores: Vec::new(),
            score: Some(0.71),
            horizon_s: 30.0,
            expected_contention_s: Some(17.0),
            reasons: Vec::new(),
            trigger: TriggerView {
                state: TriggerState::Firing,
                start_score: 0.5,
                stop_score: 0.2,
                cooldown_until_unix_ms: None,
                latest_start_unix_ms: None,
            },
            calibration_error: None,
            fallback: None,
            at_risk: Vec::new(),
            computed_unix_ms: 1,
        }
    }

    fn scene(machines: usize) -> Scene {
        Scene {
            at_s: 12.3,
            phase: "load grows".into(),
            view: View { pools: vec![pool(machines)], ..View::default() },
            happenings: vec![Happening { at_s: 1.0, text: "words ".repeat(40) }],
            ..Scene::default()
        }
    }

    #[test]
    fn no_line_is_wider_than_eighty_columns() {
        for line in scene(12).lines(40) {
            assert!(line.width() <= COLUMNS, "{} columns: {}", line.width(), line.plain());
        }
    }

    #[test]
    fn the_picture_shows_load_score_and_machines() {
        let text: Vec<String> = scene(1).lines(40).iter().map(Line::plain).collect();
        let text = text.join("\n");
        for expected in ["0.90 of 1.20 cores", "75 %", "0.71 firing", "full in about 17 s", "a-rather-long-name-0 0.90"]
        {
            assert!(text.contains(expected), "{expected} is missing in\n{text}");
        }
    }

    #[test]
    fn a_small_terminal_shows_the_newest_happenings() {
        let happening =
            |number: usize| Happening { at_s: 1.0, text: format!("number {number} {}", "word ".repeat(20)) };
        let scene = Scene { happenings: (0..9).map(happening).collect(), ..scene(1) };
        let fixed = scene.lines(0).len();
        let lines = scene.lines(fixed + 5);
        assert_eq!(lines.len(), fixed + 4, "two of them, of two lines each");
        let text: Vec<String> = lines.iter().map(Line::plain).collect();
        assert!(text[fixed].contains("number 7") && text[fixed + 2].contains("number 8"), "{text:#?}");
    }

    #[test]
    fn the_plain_line_tells_the_same() {
        assert!(scene(1).plain_line().contains("a cpu 0.90/1.20 score 0.71 firing"), "{}", scene(1).plain_line());
    }
}
