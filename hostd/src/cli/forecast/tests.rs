//! The command from its arguments to its files.

use super::*;
use clap::Parser;

#[derive(Debug, Parser)]
struct Line {
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

/// Two machines of four days at ten minutes, the second with gaps.
fn csv() -> String {
    let mut text = "unix_seconds,a,b\n".to_owned();
    for t in 0..4 * 144 {
        let day = (f64::from(t) * std::f64::consts::TAU / 144.0).sin();
        let jitter = f64::from(t * 7919 % 101) / 25.0;
        let second = if t % 9 == 4 { String::new() } else { format!("{:.2}", 20.0 + jitter) };
        text.push_str(&format!("{},{:.2},{second}\n", 600 * t, 40.0 + 30.0 * day + jitter));
    }
    text
}

#[test]
fn a_trace_becomes_a_report_a_table_and_a_plot() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("cpu.csv"), csv()).unwrap();
    std::fs::write(path("pools.json"), r#"{"pools": [["a", "b"]]}"#).unwrap();
    let line = Line::parse_from([
        "forecast",
        "evaluate",
        "--cpu",
        &path("cpu.csv"),
        "--pools",
        &path("pools.json"),
        "--pool-cpu",
        &path("cpu.csv"),
        "--svg",
        &path("plot.svg"),
        "--horizons",
        "10,60",
        "--json",
        &path("report.json"),
    ]);
    let Command::Evaluate(arguments) = line.command;
    evaluate(&Output::new(line.json), &arguments).unwrap();
    let report: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path("report.json")).unwrap()).unwrap();
    for part in ["mae_over_naive", "pinball95_over_naive", "coverage95", "machines_off_percent"] {
        assert!(report["cpu"][part]["60"].is_number() && report["cpu"][part]["10"].is_number(), "{part}: {report}");
    }
    for part in ["brier", "ece", "skill_from_quiet"] {
        assert!(report["pool"][part]["60"].is_number(), "{part}: {report}");
    }
    assert!(report["cost"]["ns_per_update_and_forecast"].as_f64().unwrap() > 0.0);
    assert!(report["cost"]["state_bytes"].as_u64().unwrap() > 500);
    assert!(report["memory"].is_null());
    let plot = std::fs::read_to_string(path("plot.svg")).unwrap();
    assert!(plot.starts_with("<svg") && plot.trim_end().ends_with("</svg>") && plot.contains("n_sigma"));
    assert_eq!(plot.matches("<g ").count(), plot.matches("</g>").count());
}

#[test]
fn arguments_that_belong_together() {
    let refused = |arguments: &[&str]| Line::try_parse_from(arguments).unwrap_err().to_string();
    assert!(refused(&["forecast", "evaluate", "--cpu", "a.csv", "report.json"]).contains("--json"));
    assert!(refused(&["forecast", "evaluate", "--bitbrains", "x", "--cpu", "a"]).contains("cannot be used"));
    let nothing = Line::parse_from(["forecast", "evaluate"]);
    let Command::Evaluate(arguments) = nothing.command;
    assert!(evaluate(&Output::new(false), &arguments).unwrap_err().to_string().contains("give a trace"));
}
