//! Plots as SVG, written by hand: bars of the predictor beside its baselines, lines of what was said against what came.

use std::fmt::Write;

use predictor::replay::summary::{ByHorizon, MachineSummary, PoolSummary};

use super::report::{Report, horizons};

/// Colours that are told apart by colour-blind readers too (Okabe and Ito, 2008).
pub(in super::super) const COLOURS: [&str; 7] =
    ["#0072b2", "#999999", "#e69f00", "#56b4e9", "#d55e00", "#009e73", "#cc79a7"];

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 260.0;
const MARGIN: f64 = 44.0;

/// One name with a value for each group.
type Row<'a> = (&'a str, Vec<Option<f64>>);

/// Text that may stand in XML.
pub(in super::super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

pub(in super::super) fn label(out: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let text = escape(text);
    _ = writeln!(out, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#);
}

pub(in super::super) fn line(out: &mut String, from: (f64, f64), to: (f64, f64), colour: &str) {
    let ((x1, y1), (x2, y2)) = (from, to);
    _ = writeln!(out, r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{colour}"/>"#);
}

/// A document of that size around panels.
pub(in super::super) fn document(width: f64, height: f64, panels: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{panels}</svg>\n"
    )
}

fn bars(title: &str, groups: &[&str], rows: &[Row<'_>]) -> String {
    let mut out = String::new();
    let highest = rows.iter().flat_map(|(_, values)| values.iter().flatten()).fold(0.0_f64, |a, b| a.max(*b));
    // One bad baseline must not make all others flat.
    let top = (1.05 * highest).clamp(1e-6, 3.0_f64.max(0.3 * highest));
    let (width, height) = (WIDTH - 2.0 * MARGIN, HEIGHT - 2.2 * MARGIN);
    let y = |value: f64| MARGIN + height * (1.0 - (value / top).min(1.0));
    label(&mut out, WIDTH / 2.0, 20.0, "middle", title);
    for tick in 0..=4 {
        let value = top * f64::from(tick) / 4.0;
        line(&mut out, (MARGIN, y(value)), (MARGIN + width, y(value)), "#e5e5e5");
        label(&mut out, MARGIN - 4.0, y(value) + 4.0, "end", &format!("{value:.3}"));
    }
    let group_width = width / groups.len().max(1) as f64;
    let bar = 0.8 * group_width / rows.len().max(1) as f64;
    for (g, group) in groups.iter().enumerate() {
        let left = MARGIN + group_width * (g as f64 + 0.1);
        label(&mut out, left + 0.4 * group_width, MARGIN + height + 14.0, "middle", &format!("{group} min"));
        for (r, (_, values)) in rows.iter().enumerate() {
            let Some(value) = values.get(g).copied().flatten() else { continue };
            let (x, top, colour) = (left + bar * r as f64, y(value), COLOURS[r % COLOURS.len()]);
            let tall = MARGIN + height - top;
            let _ = writeln!(
                out,
                r#"<rect x="{x:.1}" y="{top:.1}" width="{:.1}" height="{tall:.1}" fill="{colour}"><title>{value:.4}</title></rect>"#,
                0.92 * bar
            );
        }
    }
    for (r, (name, _)) in rows.iter().enumerate() {
        let (x, y) = (MARGIN + 125.0 * (r % 3) as f64, MARGIN + height + 30.0 + 14.0 * (r / 3) as f64);
        let colour = COLOURS[r % COLOURS.len()];
        _ = writeln!(out, r#"<rect x="{x:.1}" y="{:.1}" width="9" height="9" fill="{colour}"/>"#, y - 9.0);
        label(&mut out, x + 13.0, y, "start", name);
    }
    out
}

fn values(by: &ByHorizon, keys: &[&str]) -> Vec<Option<f64>> {
    keys.iter().map(|key| by.get(*key).copied()).collect()
}

fn machines(name: &str, summary: &MachineSummary) -> [String; 2] {
    let keys = horizons(&summary.mae_over_naive);
    let mut errors: Vec<Row<'_>> = vec![("predictor", values(&summary.mae_over_naive, &keys))];
    let mut losses: Vec<Row<'_>> = vec![("predictor", values(&summary.pinball95_over_naive, &keys))];
    for (name, of) in &summary.baselines {
        errors.push((name, values(&of.mae_over_naive, &keys)));
        losses.push((name, values(&of.pinball95_over_naive, &keys)));
    }
    [
        bars(&format!("{name}: absolute error over naive's"), &keys, &errors),
        bars(&format!("{name}: 0.95 pinball loss over naive's"), &keys, &losses),
    ]
}

fn pools(summary: &PoolSummary) -> [String; 2] {
    let keys = horizons(&summary.brier);
    let mut rows: Vec<Row<'_>> = vec![("predictor", values(&summary.brier, &keys))];
    rows.extend(summary.baselines.iter().map(|(name, brier)| (name.as_str(), values(brier, &keys))));
    [bars("pools: Brier score", &keys, &rows), reliability(summary, &keys)]
}

fn reliability(summary: &PoolSummary, keys: &[&str]) -> String {
    let mut out = String::new();
    let size = HEIGHT - 2.0 * MARGIN;
    let at = |said: f64, came: f64| (MARGIN + size * said, MARGIN + size * (1.0 - came));
    label(&mut out, MARGIN + size / 2.0, 20.0, "middle", "pools: share that came against probability said");
    line(&mut out, at(0.0, 0.0), at(1.0, 0.0), "#999999");
    line(&mut out, at(0.0, 0.0), at(0.0, 1.0), "#999999");
    line(&mut out, at(0.0, 0.0), at(1.0, 1.0), "#cccccc");
    for (number, key) in keys.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let bins = summary.reliability.get(*key).map(Vec::as_slice).unwrap_or_default();
        let points: Vec<(f64, f64)> = bins.iter().map(|bin| at(bin.said, bin.came)).collect();
        for pair in points.windows(2) {
            line(&mut out, pair[0], pair[1], colour);
        }
        for ((x, y), bin) in points.iter().zip(bins) {
            let _ = writeln!(
                out,
                r#"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{colour}"><title>{} origins</title></circle>"#,
                bin.count
            );
        }
        label(&mut out, MARGIN + size + 14.0, MARGIN + 14.0 * number as f64, "start", &format!("{key} min"));
        let (x, y) = (MARGIN + size + 4.0, MARGIN + 14.0 * number as f64 - 8.0);
        _ = writeln!(out, r#"<rect x="{x:.1}" y="{y:.1}" width="8" height="8" fill="{colour}"/>"#);
    }
    for tick in 0..=4 {
        let value = f64::from(tick) / 4.0;
        label(&mut out, at(value, 0.0).0, MARGIN + size + 14.0, "middle", &format!("{value}"));
        label(&mut out, MARGIN - 4.0, at(0.0, value).1 + 4.0, "end", &format!("{value}"));
    }
    out
}

/// The whole plot: two panels a row.
pub(super) fn svg(report: &Report) -> String {
    let cpu = report.cpu.iter().map(|summary| machines("cpu", summary));
    let memory = report.memory.iter().map(|summary| machines("memory", summary));
    let rows: Vec<[String; 2]> = cpu.chain(memory).chain(report.pool.iter().map(pools)).collect();
    let mut out = String::new();
    for (row, panels) in rows.iter().enumerate() {
        for (column, panel) in panels.iter().enumerate() {
            let (x, y) = (WIDTH * column as f64, HEIGHT * row as f64);
            _ = writeln!(out, "<g transform=\"translate({x:.0} {y:.0})\">\n{panel}</g>");
        }
    }
    document(2.0 * WIDTH, HEIGHT * rows.len() as f64, &out)
}
