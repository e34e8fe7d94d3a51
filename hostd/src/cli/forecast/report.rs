//! The report of an evaluation: JSON by its contract, and a table for people.

use predictor::evaluate::Cost;
use predictor::model::dear::DEAR_NAMES;
use predictor::replay::panels::PanelSummary;
use predictor::replay::summary::{ByHorizon, MachineSummary, PoolSummary};
use predictor::replay::{Method, Protocol};
use serde::Serialize;

use super::super::output::Table;

/// What `headroom forecast evaluate --json FILE` writes.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cpu: Option<MachineSummary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<MachineSummary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pool: Option<PoolSummary>,
    pub(super) cost: Cost,
    pub(super) protocol: Protocol,
}

/// What `headroom forecast evaluate --panels N --json FILE` writes.
#[derive(Debug, Serialize)]
pub(super) struct Panels {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cpu: Option<PanelSummary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<PanelSummary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pool: Option<PanelSummary>,
    /// Whether this build could fit recurrent networks.
    pub(super) networks: bool,
}

/// The comparison of panels as tables.
pub(super) fn panels(report: &Panels) -> String {
    let mut text = String::new();
    let all = [("cpu", &report.cpu), ("memory", &report.memory), ("sums of pools", &report.pool)];
    for (name, summary) in all.into_iter().filter_map(|(name, summary)| Some((name, summary.as_ref()?))) {
        let mut table = Table::new(&["STEPS", "TREES", "PANEL", "BETTER", "PANEL MAE", "COVERED", "SPOKE", "ALONE"]);
        for (steps, score) in &summary.horizons {
            let by_name = |of: &std::collections::BTreeMap<String, f64>, scale: f64, digits: usize| {
                let known = DEAR_NAMES.iter().filter_map(|name| Some((name, of.get(*name)?)));
                let cells: Vec<String> =
                    known.map(|(name, value)| format!("{name} {:.digits$}", scale * value)).collect();
                cells.join(", ")
            };
            let numbers = [score.trees, score.panel, score.better, score.panel_error, score.panel_coverage];
            let cells = std::iter::once(steps.to_string()).chain(numbers.map(|number| format!("{number:.3}")));
            let cells = cells.chain([by_name(&score.spoke, 100.0, 0), by_name(&score.alone, 1.0, 2)]);
            table.row(cells.collect());
        }
        text.push_str(&format!("{name}: {} series\n{}\n", summary.series, table.text("nothing")));
    }
    text.push_str(
        "0.95 pinball loss over that of the bank alone: with trees, of the panel, of whichever of the two has lately lost less, and of each \
         dear model by itself; error of the panel's point over the bank's; share covered by its 0.95 quantile; origins in per cent for which \
         each model spoke\n",
    );
    if !report.networks {
        text.push_str("this build cannot fit recurrent networks: build it with `--features lstm`\n");
    }
    text
}

/// Keys in the order of time and not of letters.
pub(super) fn horizons(of: &ByHorizon) -> Vec<&str> {
    let mut keys: Vec<&str> = of.keys().map(String::as_str).collect();
    keys.sort_by(|a, b| a.parse::<f64>().unwrap_or(0.0).total_cmp(&b.parse().unwrap_or(0.0)));
    keys
}

fn row(table: &mut Table, name: &str, keys: &[&str], digits: usize, of: &[&ByHorizon]) {
    let cell =
        |by: &ByHorizon, key: &str| by.get(key).map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"));
    let cells = of.iter().flat_map(|by| keys.iter().map(|key| cell(by, key)));
    table.row(std::iter::once(name.to_owned()).chain(cells).collect());
}

fn head(first: &str, keys: &[&str], groups: &[&str]) -> Vec<String> {
    let cells = groups.iter().flat_map(|group| keys.iter().map(move |key| format!("{group} {key}")));
    std::iter::once(first.to_owned()).chain(cells).collect()
}

fn machines(name: &str, summary: &MachineSummary) -> String {
    let keys = horizons(&summary.mae_over_naive);
    let head = head("METHOD", &keys, &["MAE", "P95", "COVERED", "OFF%"]);
    let mut table = Table::new(&head.iter().map(String::as_str).collect::<Vec<_>>());
    let ours =
        [&summary.mae_over_naive, &summary.pinball95_over_naive, &summary.coverage95, &summary.machines_off_percent];
    row(&mut table, Method::Predictor.name(), &keys, 3, &ours);
    for method in &Method::ALL[1..] {
        if let Some(of) = summary.baselines.get(method.name()) {
            let of = [&of.mae_over_naive, &of.pinball95_over_naive, &of.coverage95, &of.machines_off_percent];
            row(&mut table, method.name(), &keys, 3, &of);
        }
    }
    format!(
        "{name}: {} machines; error and 0.95 pinball loss over naive's, share covered by the 0.95 quantile, machines off by more \
         than 3 points; columns by minutes ahead\n{}\
         naive: the last value, and its past residuals in recent steps; naive_plain: those residuals as they were; daily_naive: the \
         value a day before; n_sigma: mean and 1.645 deviations of the last day; trailing_quantile: median and 0.95 quantile of the \
         last day; bank: the predictor without trees over all machines; an oracle's error and loss are 0\n\n",
        summary.machines,
        table.text("nothing")
    )
}

fn pools(summary: &PoolSummary) -> String {
    let keys = horizons(&summary.brier);
    let head = head("METHOD", &keys, &["BRIER", "ECE", "SKILL", "QUIET", "AUC"]);
    let mut table = Table::new(&head.iter().map(String::as_str).collect::<Vec<_>>());
    let ours = [&summary.brier, &summary.ece, &summary.skill, &summary.skill_from_quiet, &summary.auc_from_quiet];
    row(&mut table, "predictor", &keys, 4, &ours);
    for (name, brier) in &summary.baselines {
        row(&mut table, name, &keys, 4, &[brier]);
    }
    format!(
        "pools: {} of them; probability that the sum of their machines exceeds their capacity within so many minutes; skill over \
         the base rate, over all and from quiet\n{}\
         without_trees: each pool for itself; naive: the last value and past residuals of the maximum; n_sigma: mean and deviation of \
         the last day; reactive: certain of it when that many per cent of the capacity are used; base_rate: how often it came in the \
         test itself; an oracle's score is 0\n\n",
        summary.pools,
        table.text("nothing")
    )
}

/// The report as tables.
pub(super) fn text(report: &Report) -> String {
    let mut text = String::new();
    if let Some(cpu) = &report.cpu {
        text.push_str(&machines("cpu", cpu));
    }
    if let Some(memory) = &report.memory {
        text.push_str(&machines("memory", memory));
    }
    if let Some(pool) = &report.pool {
        text.push_str(&pools(pool));
    }
    let Protocol { test_from, calibrate_from, day, origin_every, .. } = &report.protocol;
    let days = |steps: &usize| *steps as f64 / *day as f64;
    text.push_str(&format!(
        "cost: {:.0} ns an update with all horizons read, {} bytes a series\ntest from day {:.1}, residuals of the baselines from \
         day {:.1}, an origin every {origin_every} steps\n",
        report.cost.ns_per_update_and_forecast,
        report.cost.state_bytes,
        days(test_from),
        days(calibrate_from),
    ));
    text
}
