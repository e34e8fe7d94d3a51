//! Runs of one scenario: ours and the peer's in turn, so that a change of the machine's mood meets both.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use headroom_guest::{Client, Settings};
use hostd::demo::observer::{Observer, Target};
use hostd::lab::Lab;

use crate::cpu::Watch;
use crate::limits::Limits;
use crate::ours::{self, Vmm};
use crate::qemu::{Moved, Qemu};
use crate::result::{GuestView, Outcome, PeerOutcome, PeerRun, Run};
use crate::scenario::Scenario;
use crate::setting::{Setting, kernel};
use crate::site;

/// The guest works so long before it is moved: the filling is over and the rates are steady.
const SETTLE: Duration = Duration::from_millis(1500);

/// The observer goes on so long after the move, to see the end of the gap.
const AFTER: Duration = Duration::from_millis(500);

const CONTROL_PORT: u16 = 9000;

/// The machine's name to the observer.
const TARGET: &str = "bench";

/// Measures one scenario.
pub fn scenario(
    scenario: Scenario,
    runs: u16,
    setting: &Setting,
    peer: Option<&str>,
    limits: &Limits,
) -> Result<Outcome> {
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for run in 1..=runs {
        hostd::lab::interrupt::check()?;
        eprintln!("{scenario:?} run {run} of {runs} ...");
        ours.push(our_run(scenario, setting).with_context(|| format!("{scenario:?}, run {run}"))?);
        if peer.is_some() {
            theirs.push(peer_run(scenario, setting).with_context(|| format!("{scenario:?} on QEMU, run {run}"))?);
        }
    }
    let peer = peer.map(|version| PeerOutcome { name: "qemu", version: version.to_owned(), runs: theirs });
    Ok(Outcome::new(scenario, setting.link, ours, peer, limits.clone()))
}

fn our_run(scenario: Scenario, setting: &Setting) -> Result<Run> {
    let lab = site::build()?;
    setting.link.shape(&lab)?;
    let (a, b) = (lab.host("host1")?, lab.host("host2")?);
    let source = Vmm::start(a, scenario, Some(kernel(&lab)?))?;
    let destination = Vmm::start(b, scenario, None)?;
    let migrate = || {
        let watch = Watch::start(source.id(), destination.id())?;
        let report = ours::migrate((a, &source), (b, &destination), setting, scenario.mode())?;
        Ok((report, watch.stop()?))
    };
    let ((mut report, cpu), seen) = observed(&lab, migrate).context("headroom-vmm")?;
    report.network_gap_ms = Some(seen.gap_ms);
    let over = report.paused_unix_ms.and_then(|paused| seen.silence_over(paused, report.downtime_ms.total));
    let over = over.map_or_else(String::new, |ms| format!("outside silence over it {ms:.1} ms, "));
    eprintln!(
        "  headroom: total {:.0} ms, downtime {:.1} ms, {over}{seen}, {cpu}",
        report.total_ms, report.downtime_ms.total
    );
    if let Some(post) = &report.postcopy {
        let (faults, p50, p99) = (post.faults, post.fault_us_p50, post.fault_us_p99);
        eprintln!(
            "            post-copy: {faults} faults, p50 {p50:.0} us, p99 {p99:.0} us, {} pages pushed",
            post.pushed_pages
        );
    }
    check_oracles(&lab)?;
    Ok(Run { report, cpu, guest: seen.guest })
}

fn peer_run(scenario: Scenario, setting: &Setting) -> Result<PeerRun> {
    let lab = site::build()?;
    setting.link.shape(&lab)?;
    let (a, b) = (lab.host("host1")?, lab.host("host2")?);
    let kernel: &Path = &kernel(&lab)?;
    let mut source = Qemu::start(a, scenario, kernel, false)?;
    let mut destination = Qemu::start(b, scenario, kernel, true)?;
    let migrate = || {
        let watch = Watch::start(source.id(), destination.id())?;
        let moved = source.migrate((b, &mut destination), setting, scenario.mode())?;
        Ok((moved, watch.stop()?))
    };
    let ((moved, cpu), seen) = observed(&lab, migrate)?;
    eprintln!("  peer:     total {:.0} ms, downtime {:.1} ms, {seen}, {cpu}", moved.total_ms, moved.downtime_ms);
    check_oracles(&lab)?;
    let Moved { total_ms, downtime_ms } = moved;
    Ok(PeerRun { total_ms, downtime_ms, network_gap_ms: seen.gap_ms, cpu, guest: seen.guest })
}

/// What the observer saw of one move.
struct Seen {
    /// Longest silence, in milliseconds.
    gap_ms: f64,
    /// When it began, in milliseconds since the move was asked for.
    gap_at_ms: f64,
    /// Longest time for which the observer itself did not send.
    stall_ms: f64,
    /// What the guest itself noticed.
    guest: GuestView,
    observer: Observer,
    /// The observer's time and Unix time in milliseconds at one moment.
    clocks: (u64, f64),
}

impl Seen {
    /// Longest silence that overlaps `length_ms` from a moment of Unix time on.
    fn silence_over(&self, unix_ms: f64, length_ms: f64) -> Option<f64> {
        let (observer_ns, observer_unix_ms) = self.clocks;
        let start = (observer_ns as f64 - (observer_unix_ms - unix_ms) * 1e6).max(0.0) as u64;
        self.observer.silence_over(TARGET, &(start..start + (length_ms * 1e6) as u64))
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { gap_ms, gap_at_ms, stall_ms, .. } = self;
        write!(
            f,
            "longest silence {gap_ms:.1} ms from {gap_at_ms:.0} ms on (the observer's own stall: {stall_ms:.1} ms)"
        )
    }
}

/// Runs `migrate` under the eyes of an observer that sends 1,000 requests a second; returns what it saw as well.
fn observed<T>(lab: &Lab, migrate: impl FnOnce() -> Result<T>) -> Result<(T, Seen)> {
    wait_ready(lab)?;
    std::thread::sleep(SETTLE);
    let target =
        Target { name: TARGET.into(), address: site::guest_address(), udp_per_second: 1000, tcp_per_second: 0 };
    let mut client = client(lab)?;
    client.set(Settings { reset_stall: true, ..Settings::default() })?;
    let before = swept(&mut client)?;
    let observer = Observer::start(lab.observer(), vec![target])?;
    std::thread::sleep(Duration::from_millis(300));
    let start = swept(&mut client)?;
    let started = observer.now();
    let moved = migrate()?;
    let end = swept(&mut client)?;
    std::thread::sleep(AFTER);
    let summary = observer.udp(TARGET, started..observer.now()).context("the observer saw nothing")?;
    if summary.answered == 0 {
        bail!("the guest answered no echo request: {summary:?}");
    }
    let gap_at_ms = (summary.gap_start_ns as f64 - started as f64) / 1e6;
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64() * 1e3;
    let clocks = (observer.now(), unix);
    let guest = GuestView::new(&before, &start, &end);
    Ok((moved, Seen { gap_ms: summary.gap_ms, gap_at_ms, stall_ms: summary.send_stall_ms, guest, observer, clocks }))
}

/// How far the sweeper had come, and when.
struct Swept {
    at: Instant,
    pages: u64,
    longest_stall_us: u64,
}

fn swept(client: &mut Client) -> Result<Swept> {
    let status = client.status().context("the guest does not answer")?;
    Ok(Swept { at: Instant::now(), pages: status.sweep_pages_checked, longest_stall_us: status.longest_stall_us })
}

impl GuestView {
    fn new(before: &Swept, start: &Swept, end: &Swept) -> Self {
        let rate = |from: &Swept, to: &Swept| {
            let pages = to.pages.saturating_sub(from.pages) as f64;
            pages * 4096.0 / f64::from(1 << 20) / (to.at - from.at).as_secs_f64()
        };
        Self {
            sweep_mib_per_second_before: rate(before, start),
            sweep_mib_per_second_while_moving: rate(start, end),
            longest_stall_ms: end.longest_stall_us as f64 / 1e3,
        }
    }
}

fn client(lab: &Lab) -> Result<Client> {
    let address = SocketAddr::new(site::guest_address().into(), CONTROL_PORT);
    Ok(lab.observer().run(|| Client::connect(address))??)
}

/// Waits until the guest has filled its memory.
fn wait_ready(lab: &Lab) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut client = client(lab)?;
    client.set_deadline(Duration::from_millis(500));
    loop {
        match client.status() {
            Ok(status) if status.ready => return Ok(()),
            Ok(_) if Instant::now() > deadline => bail!("the guest has not filled its memory within 30 s"),
            Err(error) if Instant::now() > deadline => return Err(error).context("the guest does not answer"),
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn check_oracles(lab: &Lab) -> Result<()> {
    let status = client(lab)?.status().context("the guest does not answer after the move")?;
    if status.sweep_errors != 0 || status.disk_errors != 0 {
        bail!("the guest found {} wrong pages and {} wrong blocks", status.sweep_errors, status.disk_errors);
    }
    Ok(())
}
