//! The promises of the demo, each checked against what was measured.

use migration::report::{Outcome, Report};
use serde::Serialize;

use super::observer::{TcpSummary, UdpSummary};

/// Longest network gap that is promised, in milliseconds.
pub const GAP_MS_MAX: f64 = 50.0;

/// By how much the reported downtime may differ from the silence seen from outside, in milliseconds.
pub const DISAGREEMENT_MS_MAX: f64 = 5.0;

/// What one guest says of itself at the end.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Oracle {
    /// Machine.
    pub machine: String,
    /// It answered.
    pub answered: bool,
    /// Pages that its sweeper checked.
    pub sweep_pages_checked: u64,
    /// Pages that were lost, stale or torn.
    pub sweep_errors: u64,
    /// Blocks that its disk verifier read back.
    pub disk_blocks_checked: u64,
    /// Blocks that were wrong, and failed requests.
    pub disk_errors: u64,
}

/// What the demo found out.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// The migration that the planner started, from its source.
    pub report: Option<Report>,
    /// From its end to the moment at which the pool would have exceeded its capacity; `None` if that never came.
    pub lead_s: Option<f64>,
    /// UDP while the machine was moved.
    pub udp: Option<UdpSummary>,
    /// 1,000 requests a second were sent from before the machine stopped until after it arrived.
    pub watched_throughout: bool,
    /// The TCP connection to the machine that moved.
    pub tcp: Option<TcpSummary>,
    /// All guests.
    pub oracles: Vec<Oracle>,
    /// What was found after everything was removed.
    pub leftovers: Vec<String>,
}

/// One promise.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Promise {
    /// What was promised.
    pub promise: &'static str,
    /// Whether it was kept.
    pub kept: bool,
    /// What was measured.
    pub measured: String,
}

/// Checks every promise. What was not measured was not kept.
pub fn check(findings: &Findings) -> Vec<Promise> {
    let report = findings.report.as_ref();
    let completed = report.is_some_and(|report| report.outcome == Outcome::Completed);
    let mut promises = vec![Promise {
        promise: "the planner moves a machine to the other pool by itself",
        kept: completed,
        measured: report.map_or("no migration".into(), |report| {
            format!("{} {} -> {}: {:?}", report.machine, report.source, report.destination, report.outcome)
        }),
    }];
    promises.push(Promise {
        promise: "the move ends before the pool would have exceeded its capacity",
        kept: completed && findings.lead_s.is_some_and(|lead| lead > 0.0),
        measured: findings.lead_s.map_or("no contention came".into(), |lead| format!("{lead:.1} s ahead")),
    });
    promises.extend(network(findings));
    promises.push(digests(report));
    promises.push(Promise {
        promise: "the TCP connection lives and every byte comes back in order",
        kept: findings.tcp.as_ref().is_some_and(|tcp| tcp.complete() && tcp.bytes_echoed > 0),
        measured: findings.tcp.as_ref().map_or("no connection".into(), tcp_in_words),
    });
    promises.push(oracles(&findings.oracles));
    promises.push(Promise {
        promise: "nothing is left behind",
        kept: findings.leftovers.is_empty(),
        measured: if findings.leftovers.is_empty() { "nothing".into() } else { findings.leftovers.join(", ") },
    });
    promises
}

fn network(findings: &Findings) -> [Promise; 2] {
    let udp = findings.udp.as_ref().filter(|udp| udp.answered > 0 && findings.watched_throughout);
    let (gap, silence) = (udp.map(|udp| udp.gap_ms), udp.and_then(|udp| udp.downtime_gap_ms));
    let unmeasured = || "not observed throughout".to_owned();
    let downtime = findings.report.as_ref().map(|report| report.downtime_ms.total);
    let difference = silence.zip(downtime).map(|(silence, downtime)| silence - downtime);
    [
        Promise {
            promise: "an outside observer misses the machine for at most 50 ms",
            kept: gap.is_some_and(|gap| gap <= GAP_MS_MAX),
            measured: gap.map_or_else(unmeasured, |gap| format!("{gap:.1} ms")),
        },
        Promise {
            promise: "the reported downtime agrees with the silence that the observer saw within 5 ms",
            kept: difference.is_some_and(|difference| difference.abs() <= DISAGREEMENT_MS_MAX),
            measured: difference.map_or_else(unmeasured, |difference| format!("{difference:+.1} ms")),
        },
    ]
}

fn digests(report: Option<&Report>) -> Promise {
    let verification = report.map(|report| &report.verification);
    let equal = verification.is_some_and(|v| v.memory_digest_ok == Some(true) && v.disk_digest_ok == Some(true));
    let probes = verification.is_some_and(|v| v.probes.iter().all(|probe| probe.ok));
    Promise {
        promise: "memory and disk arrive as they were sent, and the machine answers its probes",
        kept: equal && probes,
        measured: verification.map_or("not verified".into(), |v| {
            let asked = v.probes.len();
            let answered = v.probes.iter().filter(|probe| probe.ok).count();
            format!("{} pages and {} blocks compared, {answered} of {asked} probes", v.pages_checked, v.blocks_checked)
        }),
    }
}

fn oracles(oracles: &[Oracle]) -> Promise {
    let kept = |oracle: &Oracle| {
        let worked = oracle.sweep_pages_checked > 0 && oracle.disk_blocks_checked > 0;
        oracle.answered && worked && oracle.sweep_errors == 0 && oracle.disk_errors == 0
    };
    let bad: Vec<String> = oracles.iter().filter(|oracle| !kept(oracle)).map(oracle_in_words).collect();
    let pages: u64 = oracles.iter().map(|oracle| oracle.sweep_pages_checked).sum();
    let blocks: u64 = oracles.iter().map(|oracle| oracle.disk_blocks_checked).sum();
    Promise {
        promise: "every guest finds its own memory and disk as it left them",
        kept: bad.is_empty() && !oracles.is_empty(),
        measured: if bad.is_empty() {
            format!("{pages} pages and {blocks} blocks checked by {} guests, no error", oracles.len())
        } else {
            bad.join("; ")
        },
    }
}

fn oracle_in_words(oracle: &Oracle) -> String {
    if !oracle.answered {
        return format!("{} does not answer", oracle.machine);
    }
    format!(
        "{}: {} bad of {} pages, {} bad of {} blocks",
        oracle.machine, oracle.sweep_errors, oracle.sweep_pages_checked, oracle.disk_errors, oracle.disk_blocks_checked
    )
}

fn tcp_in_words(tcp: &TcpSummary) -> String {
    match (&tcp.closed, tcp.wrong_at) {
        (Some(why), _) => format!("ended: {why}"),
        (None, Some(place)) => format!("byte {place} came back wrong"),
        (None, None) => format!("{} of {} bytes came back", tcp.bytes_echoed, tcp.bytes_sent),
    }
}

#[cfg(test)]
mod tests {
    use migration::report::{Downtime, Mode, Probe, Verification};

    use super::*;

    fn good() -> Findings {
        let verification = Verification {
            memory_digest_ok: Some(true),
            disk_digest_ok: Some(true),
            pages_checked: 10,
            blocks_checked: 10,
            probes: vec![Probe { name: "ping".into(), ok: true, detail: String::new() }],
            ..Verification::default()
        };
        let report = Report {
            id: "m1".into(),
            machine: "vm1".into(),
            source: "a1".into(),
            destination: "b1".into(),
            mode: Mode::Precopy,
            outcome: Outcome::Completed,
            reason: String::new(),
            transient: false,
            total_ms: 900.0,
            paused_unix_ms: Some(1.0),
            downtime_ms: Downtime { total: 10.0, ..Downtime::default() },
            network_gap_ms: None,
            rounds: Vec::new(),
            memory: Default::default(),
            disk: Default::default(),
            postcopy: None,
            throttle_percent_max: 0,
            throttled: Vec::new(),
            warnings: Vec::new(),
            streams: 2,
            tls: Default::default(),
            verification,
            trigger: Default::default(),
        };
        let oracle = Oracle {
            machine: "vm1".into(),
            answered: true,
            sweep_pages_checked: 1,
            disk_blocks_checked: 1,
            ..Oracle::default()
        };
        Findings {
            report: Some(report),
            lead_s: Some(3.0),
            udp: Some(UdpSummary { answered: 100, gap_ms: 12.0, downtime_gap_ms: Some(11.0), ..UdpSummary::default() }),
            watched_throughout: true,
            tcp: Some(TcpSummary { bytes_sent: 64, bytes_echoed: 64, ..TcpSummary::default() }),
            oracles: vec![oracle],
            leftovers: Vec::new(),
        }
    }

    fn broken(findings: &Findings) -> usize {
        check(findings).iter().filter(|promise| !promise.kept).count()
    }

    #[test]
    fn good_findings_keep_every_promise() {
        assert_eq!(broken(&good()), 0, "{:#?}", check(&good()));
    }

    #[test]
    fn nothing_found_keeps_none_but_the_last() {
        assert_eq!(broken(&Findings::default()), check(&Findings::default()).len() - 1);
    }

    #[test]
    fn each_promise_can_be_broken_alone() {
        let report = |change: fn(&mut Report)| {
            let mut findings = good();
            findings.report.iter_mut().for_each(change);
            findings
        };
        let cases: Vec<Findings> = vec![
            Findings { lead_s: Some(-0.1), ..good() },
            Findings { lead_s: None, ..good() },
            Findings {
                udp: Some(UdpSummary {
                    gap_ms: 15.5,
                    downtime_gap_ms: Some(15.5),
                    answered: 1,
                    ..UdpSummary::default()
                }),
                ..good()
            },
            report(|report| report.verification.memory_digest_ok = Some(false)),
            report(|report| report.verification.disk_digest_ok = None),
            report(|report| report.verification.probes[0].ok = false),
            Findings { tcp: Some(TcpSummary { bytes_sent: 64, bytes_echoed: 63, ..TcpSummary::default() }), ..good() },
            Findings { tcp: Some(TcpSummary { closed: Some("reset".into()), ..TcpSummary::default() }), ..good() },
            Findings { oracles: vec![Oracle { sweep_errors: 1, ..good().oracles[0].clone() }], ..good() },
            Findings { oracles: vec![Oracle { disk_errors: 1, ..good().oracles[0].clone() }], ..good() },
            Findings { oracles: vec![Oracle { answered: false, ..good().oracles[0].clone() }], ..good() },
            Findings { leftovers: vec!["process 1".into()], ..good() },
        ];
        for (number, findings) in cases.iter().enumerate() {
            assert_eq!(broken(findings), 1, "case {number}: {:#?}", check(findings));
        }
    }

    #[test]
    fn a_gap_over_fifty_milliseconds_breaks_the_promise_even_if_it_was_reported() {
        let mut findings = good();
        findings.udp =
            Some(UdpSummary { answered: 1, gap_ms: 51.0, downtime_gap_ms: Some(51.0), ..UdpSummary::default() });
        findings.report.iter_mut().for_each(|report| report.downtime_ms.total = 50.0);
        assert_eq!(broken(&findings), 1);
    }

    #[test]
    fn a_gap_that_nobody_watched_is_no_gap_of_zero() {
        assert_eq!(broken(&Findings { watched_throughout: false, ..good() }), 2);
    }
}
