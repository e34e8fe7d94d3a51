//! The report of a simulation: JSON, table, plot.

use std::collections::BTreeMap;

use predictor::simulate::cause::{Held, Kind};
use predictor::simulate::compare::{AtEqualMoves, Comparison, Point, Settings};
use serde::Serialize;

use super::super::forecast::plot::{COLOURS, document, label, line};
use super::super::output::Table;

/// What `headroom plan simulate --json FILE` writes.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    pub(super) comparison: Comparison,
    pub(super) settings: Settings,
    pub(super) period_s: f64,
}

pub(super) fn text(report: &Report) -> String {
    let all = &report.comparison;
    let mut points = Table::new(&[
        "POLICY",
        "SETTING",
        "MIGRATIONS",
        "VIOLATION MIN",
        "OF ALL MIN",
        "UNAVOIDABLE",
        "ARRIVAL",
        "EVENT",
        "RISE",
    ]);
    for Point { policy, setting, outcome } in &all.points {
        let of = |kind: Kind| {
            let minutes = outcome.causes.iter().filter(|cause| cause.kind == kind).map(|cause| cause.minutes);
            // The sum of nothing is -0.
            format!("{:.0}", minutes.fold(0.0, |sum, more| sum + more))
        };
        points.row(vec![
            policy.clone(),
            format!("{setting}"),
            format!("{:.0}", outcome.moves),
            format!("{:.0}", outcome.violation_minutes),
            format!("{:.3} %", 100.0 * outcome.violation_minutes / outcome.minutes.max(1.0)),
            of(Kind::Unavoidable),
            of(Kind::Arrival),
            of(Kind::Event),
            of(Kind::Rise),
        ]);
    }
    let mut equal = Table::new(&[
        "AT MOST AS MANY MIGRATIONS",
        "AGAINST",
        "MIGRATIONS",
        "VIOLATION MIN",
        "OURS",
        "WITH",
        "AT",
        "RATIO",
        "OF AVOIDABLE",
        "LEAST POSSIBLE",
        "ORACLE",
    ]);
    for row in &all.equal {
        equal.row(vec![
            row.policy.clone(),
            row.against.clone(),
            format!("{:.0}", row.moves),
            format!("{:.0}", row.theirs),
            format!("{:.0}", row.ours),
            format!("{:.0}", row.our_moves),
            format!("{}", row.setting),
            format!("{:.2}", row.ratio),
            format!("{:.2}", row.avoidable_ratio),
            format!("{:.2}", row.least_ratio),
            format!("{:.2}", row.oracle_ratio),
        ]);
    }
    format!(
        "{} groups of up to {} pools, {} events put in, {} steps ahead of {:.0} s\n{:.0} violation minutes cannot be avoided: all pools of a \
         group together use more than all have\n\n{}\n{}\nwhat kept a policy from acting at the step before, in minutes that can be \
         avoided\n{}",
        all.groups,
        report.settings.together,
        all.events,
        report.settings.horizon,
        report.period_s,
        all.unavoidable_minutes,
        points.text("nothing"),
        equal.text("nothing"),
        causes(all).text("nothing")
    )
}

/// By what each policy was kept from acting, for those that tell, at the settings of the comparison.
fn causes(all: &Comparison) -> Table {
    let mut table = Table::new(&["POLICY", "SETTING", "KEPT BY", "MIN", "FIRST OF EACH"]);
    let compared = |point: &Point| {
        let ours = |row: &AtEqualMoves| row.policy == point.policy && row.setting == point.setting;
        point.policy == "reactive" || all.equal.iter().any(ours)
    };
    for Point { policy, setting, outcome } in all.points.iter().filter(|point| compared(point)) {
        let mut by: BTreeMap<Held, [f64; 2]> = BTreeMap::new();
        for cause in outcome.causes.iter().filter(|cause| cause.kind != Kind::Unavoidable) {
            let sums = by.entry(cause.held).or_default();
            *sums = [sums[0] + cause.minutes, sums[1] + cause.first_minutes];
        }
        for (held, [minutes, first]) in by {
            table.row(vec![
                policy.clone(),
                format!("{setting}"),
                held.words().to_owned(),
                format!("{minutes:.0}"),
                format!("{first:.0}"),
            ]);
        }
    }
    table
}

/// Violation minutes against migrations, a line for each policy.
pub(super) fn svg(report: &Report) -> String {
    const WIDTH: f64 = 640.0;
    const HEIGHT: f64 = 400.0;
    const MARGIN: f64 = 60.0;
    let points = &report.comparison.points;
    let most = |of: &dyn Fn(&Point) -> f64| points.iter().map(of).fold(1.0, f64::max) * 1.05;
    let (most_moves, most_minutes) = (most(&|p| p.outcome.moves), most(&|p| p.outcome.violation_minutes));
    let at = |moves: f64, minutes: f64| {
        let x = MARGIN + (WIDTH - 2.0 * MARGIN) * moves / most_moves;
        (x, MARGIN + (HEIGHT - 2.0 * MARGIN) * (1.0 - minutes / most_minutes))
    };
    let mut out = String::new();
    label(&mut out, WIDTH / 2.0, 24.0, "middle", "violation minutes against migrations");
    for tick in 0..=4 {
        let (moves, minutes) = (most_moves * f64::from(tick) / 4.0, most_minutes * f64::from(tick) / 4.0);
        line(&mut out, at(0.0, minutes), at(most_moves, minutes), "#e5e5e5");
        label(&mut out, MARGIN - 4.0, at(0.0, minutes).1 + 4.0, "end", &format!("{minutes:.0}"));
        label(&mut out, at(moves, 0.0).0, at(0.0, 0.0).1 + 16.0, "middle", &format!("{moves:.0}"));
    }
    let mut policies: Vec<&str> = points.iter().map(|point| point.policy.as_str()).collect();
    policies.dedup();
    for (number, policy) in policies.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let mut curve: Vec<(f64, f64)> = points
            .iter()
            .filter(|point| point.policy == *policy)
            .map(|point| (point.outcome.moves, point.outcome.violation_minutes))
            .collect();
        curve.sort_by(|a, b| a.0.total_cmp(&b.0));
        for pair in curve.windows(2) {
            line(&mut out, at(pair[0].0, pair[0].1), at(pair[1].0, pair[1].1), colour);
        }
        for (moves, minutes) in &curve {
            let (x, y) = at(*moves, *minutes);
            out.push_str(&format!(
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"><title>{moves:.0} migrations, {minutes:.0} min</title></circle>\n"
            ));
        }
        let y = MARGIN + 16.0 * number as f64;
        out.push_str(&format!(
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{colour}\"/>\n",
            WIDTH - 220.0,
            y - 9.0
        ));
        label(&mut out, WIDTH - 206.0, y, "start", policy);
    }
    document(WIDTH, HEIGHT, &out)
}
