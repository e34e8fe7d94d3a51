//! The measurement as Markdown, for `docs/benchmarks-forecast.md`.

use std::fmt::Write;

use serde_json::Value;

use super::{LIMITS, Outcome};

/// The whole file.
pub fn markdown(outcome: &Outcome) -> String {
    let Outcome { load, machine, bank, tick, models, evaluate, .. } = outcome;
    let mut out = format!(
        "# What forecasts cost\n\nWritten by `make bench` (`forecast --report`). {machine}; load {load} when it began. Times are those of \
         one thread on one core; other work on the computer is not counted, what it does to caches is.\n\n"
    );
    table(
        &mut out,
        &["one bank, three horizons", "measured", "limit"],
        &[
            vec![
                "update and forecasts with four quantiles".into(),
                format!("{:.0} ns", bank.ns_per_update_and_forecast),
                format!("{:.0} ns", LIMITS.bank_ns),
            ],
            vec!["state".into(), format!("{} bytes", bank.state_bytes), format!("{} bytes", LIMITS.bank_bytes)],
        ],
    );
    let heading = format!("a tick of {} machines x {} resources", tick.machines, tick.resources);
    let row = |(name, times): (&str, &super::cost::Times)| {
        let ms = |value: f64| format!("{value:.1}");
        vec![name.to_owned(), ms(times.median_ms), ms(times.p99_ms), ms(times.slowest_ms), times.ticks.to_string()]
    };
    table(
        &mut out,
        &[&heading, "median ms", "p99 ms", "slowest ms", "ticks"],
        &tick.stages().into_iter().map(row).collect::<Vec<_>>(),
    );
    _ = writeln!(
        out,
        "The limit of a tick is {:.0} ms. The first three rows are parts of a tick on their own; the last two are whole ticks of {} \
         pools as `hostd` runs them, with four horizons.\n",
        LIMITS.tick_ms, tick.pools
    );
    let mut fits: Vec<Vec<String>> = models
        .fits
        .iter()
        .map(|fit| vec![fit.name.to_owned(), format!("{:.2} ms", fit.ms), format!("{} bytes", fit.state_bytes)])
        .collect();
    fits.push(vec!["trees, one quantile of one machine".into(), format!("{:.0} ns", models.trees_ns), String::new()]);
    table(&mut out, &["a fit to a fortnight of five minutes", "takes", "state"], &fits);
    match evaluate {
        Some(report) => quality(&mut out, report),
        None => out.push_str("No recorded trace was given (`--data`): how good forecasts are was not measured.\n"),
    }
    out
}

/// What `headroom forecast evaluate` found, by 5, 15 and 60 minutes.
fn quality(out: &mut String, report: &Value) {
    let mut rows = Vec::new();
    for (what, keys) in [
        ("cpu", ["mae_over_naive", "pinball95_over_naive", "coverage95", "machines_off_percent"].as_slice()),
        ("memory", &["mae_over_naive", "pinball95_over_naive", "coverage95", "machines_off_percent"]),
        ("pool", &["brier", "ece", "skill_from_quiet"]),
    ] {
        for key in keys {
            let value = &report[what][key];
            let at = |minutes: &str| value[minutes].as_f64().map_or("-".to_owned(), |value| format!("{value:.4}"));
            rows.push(vec![format!("{what}: {}", key.replace('_', " ")), at("5"), at("15"), at("60")]);
        }
    }
    table(out, &["on the recorded trace", "5 min", "15 min", "60 min"], &rows);
}

fn table(out: &mut String, head: &[&str], rows: &[Vec<String>]) {
    let line = |cells: &mut dyn Iterator<Item = &str>| format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "));
    out.push_str(&line(&mut head.iter().copied()));
    out.push_str(&line(&mut head.iter().map(|_| "---")));
    for row in rows {
        out.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    out.push('\n');
}
