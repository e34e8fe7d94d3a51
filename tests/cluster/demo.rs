//! `headroom demo --json FILE`, as a user runs it.

use std::process::Command;

use hostd::lab::{binary, sweep};
use tests::{Need, ready};

#[test]
fn the_planner_moves_a_machine_before_its_pool_is_full() {
    if !ready(Need::Kvm) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("demo.json");
    let mut child = Command::new(binary("headroom").unwrap()).arg("demo").arg("--json").arg(&file).spawn().unwrap();
    let pid = child.id();
    let status = child.wait().unwrap();
    let text = std::fs::read_to_string(&file).expect("the report");
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    let promises = report["promises"].as_array().expect("promises");
    // How many milliseconds it took is for a quiet machine, the demo itself and the benchmark to judge; here it may be busy.
    let timed = |promise: &serde_json::Value| promise["measured"].as_str().is_some_and(|text| text.ends_with(" ms"));
    let broken: Vec<_> = promises.iter().filter(|promise| promise["kept"] != true).collect();
    assert!(broken.iter().all(|promise| timed(promise)), "{status}: {broken:#?}");
    assert_eq!(status.success(), broken.is_empty(), "the exit code says whether a promise was broken");
    assert_eq!(report["ok"] == true, broken.is_empty(), "and so does the report");
    assert_eq!(promises.len(), 8, "a promise went missing: {promises:#?}");
    assert!(report["seconds"].as_f64().unwrap() < 180.0);
    assert!(report["lead_time_s"].as_f64().unwrap() > 0.0);
    assert!(report["migration"]["network_gap_ms"].as_f64().unwrap() > 0.0);
    let kind = &report["migration"]["trigger"]["kind"];
    assert!(kind == "forecast" || kind == "event", "the planner moves by forecast, not by {kind}");
    assert_eq!(sweep::leftovers(&sweep::process_prefix(pid)), Vec::<String>::new());
}
