//! `openapi.json` says what the code does: every route, and every field of every type, compared both ways.
//!
//! The types are described by the JSON of values in which everything is filled in. After a change to the API run this test
//! with `HEADROOM_UPDATE=1`: it writes the file, and the change is seen in review.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

use std::collections::BTreeMap;

use hostd::api::control;
use hostd::api::types::{
    AuditRecord, ChangedLimits, CreateMachine, DetachDisk, DirtyRate, DirtyRateRequest, Disk, DiskSize, Drain,
    DrainRequest, Event, HostBandwidth, HostView, Machine, MachineForecast, MigrateRequest, Migration, NewDisk,
    NewEvent, Plan, PoolCapacity, PoolView, Problem, StopMachine,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use vmm::api::{BalloonInfo, BalloonTarget};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");

#[test]
fn the_file_describes_the_code() {
    let made = serde_json::to_string_pretty(&document()).unwrap() + "\n";
    if std::env::var_os("HEADROOM_UPDATE").is_some() {
        std::fs::write(FILE, &made).unwrap();
    }
    let kept = std::fs::read_to_string(FILE).unwrap();
    if kept == made {
        return;
    }
    let line = kept.lines().zip(made.lines()).position(|(kept, made)| kept != made).unwrap_or(0);
    panic!(
        "openapi.json differs from the code at line {}:\n  file: {}\n  code: {}\nrun this test with HEADROOM_UPDATE=1",
        line + 1,
        kept.lines().nth(line).unwrap_or("(end)"),
        made.lines().nth(line).unwrap_or("(end)")
    );
}

fn document() -> Value {
    let schemas = schemas();
    let mut paths: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
    for route in control::routes() {
        let mut operation = json!({
            "summary": route.summary,
            "responses": {
                route.status.to_string(): success(route.response, &schemas),
                "default": {"description": "RFC 9457 problem document",
                    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}},
            },
        });
        if let Some(request) = route.request {
            assert!(schemas.contains_key(request), "no schema for {request}");
            operation["requestBody"] = json!({"required": true,
                "content": {"application/json": {"schema": reference(request)}}});
        }
        let variable = route.path.split('/').find_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
        if let Some(name) = variable {
            operation["parameters"] =
                json!([{"name": name, "in": "path", "required": true, "schema": {"type": "string"}}]);
        }
        let before = paths.entry(route.path).or_default().insert(route.method.to_lowercase(), operation);
        assert!(before.is_none(), "{} {} is there twice", route.method, route.path);
    }
    json!({
        "openapi": "3.1.0",
        "info": {"title": "hostd control API", "version": "1",
            "description": "HTTP/1.1 and JSON on a unix socket. Made by `cargo test -p hostd --test openapi` with HEADROOM_UPDATE=1."},
        "paths": paths,
        "components": {"schemas": schemas},
    })
}

fn success(response: Option<&str>, schemas: &BTreeMap<&str, Value>) -> Value {
    let Some(name) = response else { return json!({"description": "done"}) };
    let element = name.trim_start_matches('[').trim_end_matches(']');
    assert!(schemas.contains_key(element), "no schema for {element}");
    let schema =
        if name.starts_with('[') { json!({"type": "array", "items": reference(element)}) } else { reference(element) };
    json!({"description": "done", "content": {"application/json": {"schema": schema}}})
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// The schema of a type: that of the JSON which a complete value becomes after a round through the type itself. A field that
/// the sample lacks, or has and the type does not know, fails here.
#[allow(clippy::needless_pass_by_value)] // The table of types below reads better with values.
fn schema<T: Serialize + DeserializeOwned>(sample: Value) -> Value {
    let value: T = serde_json::from_value(sample.clone()).unwrap_or_else(|error| panic!("{error} in {sample}"));
    let round = serde_json::to_value(&value).unwrap();
    let (told, kept) = (names(&sample, ""), names(&round, ""));
    assert_eq!(told, kept, "the sample does not have exactly the fields of the type");
    assert!(!kept.iter().any(|name| name.ends_with("=null")), "the sample leaves something out: {kept:?}");
    describe(&round)
}

/// Paths of all fields; those that are null or an empty list say so.
fn names(value: &Value, path: &str) -> Vec<String> {
    match value {
        Value::Object(fields) => {
            fields.iter().flat_map(|(name, value)| names(value, &format!("{path}.{name}"))).collect()
        }
        Value::Array(items) if items.is_empty() => vec![format!("{path}=null")],
        Value::Array(items) => items.iter().flat_map(|item| names(item, &format!("{path}[]"))).collect(),
        Value::Null => vec![format!("{path}=null")],
        _ => vec![path.to_owned()],
    }
}

fn describe(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let properties: BTreeMap<&String, Value> =
                fields.iter().map(|(name, value)| (name, describe(value))).collect();
            json!({"type": "object", "properties": properties})
        }
        Value::Array(items) => json!({"type": "array", "items": items.first().map(describe)}),
        Value::String(_) => json!({"type": "string"}),
        Value::Bool(_) => json!({"type": "boolean"}),
        Value::Number(number) if number.is_f64() => json!({"type": "number"}),
        Value::Number(_) => json!({"type": "integer"}),
        Value::Null => Value::Null,
    }
}

fn schemas() -> BTreeMap<&'static str, Value> {
    BTreeMap::from([
        ("AuditRecord", schema::<AuditRecord>(audit_record())),
        ("BalloonInfo", schema::<BalloonInfo>(balloon())),
        ("BalloonTarget", schema::<BalloonTarget>(json!({"target_mib": 64}))),
        (
            "ChangedLimits",
            schema::<ChangedLimits>(
                json!({"bandwidth_bytes_per_second": 1_048_576, "downtime_ms": 50, "throttle_max_percent": 50}),
            ),
        ),
        ("CreateMachine", schema::<CreateMachine>(create_machine())),
        ("DetachDisk", schema::<DetachDisk>(json!({"id": "disk0"}))),
        ("DirtyRate", schema::<DirtyRate>(dirty_rate())),
        ("DirtyRateRequest", schema::<DirtyRateRequest>(json!({"interval_ms": 1000}))),
        (
            "Disk",
            schema::<Disk>(
                json!({"id": "disk0", "path": "/x", "bytes": 1, "owned": true, "read_only": false, "shared": false}),
            ),
        ),
        ("DiskSize", schema::<DiskSize>(json!({"id": "disk0", "bytes": 1_048_576}))),
        (
            "Drain",
            schema::<Drain>(
                json!({"state": "moving", "started_unix_ms": 1, "to": ["b1"], "machines": [{"machine": "vm1",
                "step": "moving", "destination": "b1", "migration": "mig-1", "reason": "x"}]}),
            ),
        ),
        ("DrainRequest", schema::<DrainRequest>(json!({"to": ["b1"]}))),
        ("Event", schema::<Event>(event())),
        ("HostBandwidth", schema::<HostBandwidth>(json!({"bandwidth_bytes_per_second": 1_048_576}))),
        ("HostView", schema::<HostView>(host_view())),
        ("Machine", schema::<Machine>(machine())),
        (
            "MachineForecast",
            schema::<MachineForecast>(json!({"machine": "vm1", "host": "a1", "forecasts": [forecast()]})),
        ),
        (
            "MigrateRequest",
            schema::<MigrateRequest>(json!({"destination": "b1", "limits": limits(), "trigger": trigger(),
                "pause_before_switchover": true, "retries": 3, "on_failed_probe": "return"})),
        ),
        ("Migration", schema::<Migration>(migration())),
        ("NewEvent", schema::<NewEvent>(new_event())),
        ("Plan", schema::<Plan>(plan())),
        (
            "PoolCapacity",
            schema::<PoolCapacity>(
                json!({"pool": "a", "hosts": 2, "per_host": capacity(), "risk": 0.05, "missing": 1, "provision_within_s": 60.0,
                "needs": [{"within_s": 300.0, "hosts": 2, "resource": "cpu", "use_at_risk": 1.5}], "advice": "keep", "reason": "x"}),
            ),
        ),
        ("PoolView", schema::<PoolView>(pool_view())),
        (
            "NewDisk",
            schema::<NewDisk>(json!({"id": "disk1", "size_mib": 1, "path": "/x", "read_only": false, "shared": false})),
        ),
        ("StopMachine", schema::<StopMachine>(json!({"timeout_s": 60, "force": false}))),
        ("Problem", schema::<Problem>(json!({"type": "urn:x", "title": "x", "status": 400, "detail": "x"}))),
    ])
}

fn limits() -> Value {
    json!({"downtime_ms": 50, "bandwidth_bytes_per_second": 1, "streams": 1, "max_rounds": 30, "timeout_s": 600,
        "force_switchover": false, "mode": "hybrid", "compare_full": false, "throttle_max_percent": 1})
}

fn usage() -> Value {
    json!({"cpu_cores": 0.5, "cpu_demand_cores": 0.5, "memory_mib": 1.0, "disk_bytes_per_second": 1.0, "network_bytes_per_second": 1.0})
}

fn capacity() -> Value {
    json!({"cpu_cores": 0.5, "memory_mib": 1.0, "disk_bytes_per_second": 1.0, "network_bytes_per_second": 1.0})
}

fn trigger() -> Value {
    json!({"kind": "forecast", "score": 0.5, "horizon_s": 60.0, "predicted_total_ms": 1.0, "predicted_downtime_ms": 1.0})
}

fn forecast() -> Value {
    json!({"resource": "cpu", "horizon_s": 60.0, "quantiles": [{"probability": 0.5, "value": 1.0}]})
}

fn create_machine() -> Value {
    json!({"name": "vm1", "vcpus": 1, "memory_mib": 64, "kernel": "bundled", "initrd": "/x", "cmdline": "x",
        "disks": [{"id": "disk0", "size_mib": 1, "path": "/x", "read_only": false, "shared": false}],
        "balloon": true, "networks": [{"id": "net0", "mac": "02:00:00:00:00:05"}],
        "probes": [{"ping": "10.0.0.5"}, {"tcp": "10.0.0.5:7"}, {"tcp_echo": "10.0.0.5:7"}], "limits": limits()})
}

fn machine() -> Value {
    json!({"name": "vm1", "status": "running", "reason": "x", "host": "a1", "pool": "a", "vcpus": 1, "memory_mib": 64,
        "kernel": "bundled", "cmdline": "x",
        "disks": [{"id": "disk0", "path": "/x", "bytes": 1, "owned": true, "read_only": false, "shared": false}],
        "balloon": true, "networks": [{"id": "net0", "tap": "x", "mac": "02:00:00:00:00:05"}],
        "probes": [{"ping": "10.0.0.5"}], "limits": limits(), "pid": 1, "api_socket": "/x", "console": "/x",
        "first_instruction_us": 1, "created_unix_ms": 1, "migration": "mig-1", "usage": usage()})
}

fn host_view() -> Value {
    json!({"host": "a1", "pool": "a", "version": "x", "pid": 1, "started_unix_ms": 1, "capacity": capacity(), "usage": usage(),
        "system": usage(), "pressure": {"cpu_percent": 1.0, "memory_percent": 1.0, "io_percent": 1.0}, "machines": 1,
        "migrations": 1, "migration_bandwidth_bytes_per_second": 1, "drain": "open", "peers": [{"host": "b1", "pool": "b", "address": "x", "live": true, "last_seen_unix_ms": 1, "error": "x"}]})
}

fn dirty_rate() -> Value {
    json!({"source": "sampled", "bytes_per_second": 1.0, "low_bytes_per_second": 1.0, "high_bytes_per_second": 1.0, "lower_bound": false,
        "peak_bytes_per_second": 1.0, "working_set_bytes": 1.0, "looks": [{"after_ms": 1.0, "bytes": 1.0, "low_bytes": 1.0,
        "high_bytes": 1.0}], "sampled_pages": 1, "resident_pages": 1, "throttle_percent": 1})
}

fn pool_view() -> Value {
    let machine = json!({"name": "vm1", "status": "running", "vcpus": 1, "memory_mib": 64, "disk_bytes": 1, "disk_allocated_bytes": 1, "limits": limits(),
        "usage": usage(), "dirty": {"bytes_per_second": 1.0, "working_set_bytes": 1.0, "at_unix_ms": 1}});
    json!({"pool": "a", "leader": "a1", "hosts": [{"host": "a1", "live": true, "draining": false, "capacity": capacity(), "usage": usage(),
            "machines": [machine], "sampled_unix_ms": 1}],
        "capacity": capacity(), "usage": usage(), "forecasts": [forecast()],
        "scores": [{"resource": "cpu", "probability": 0.5, "load": 1.0, "capacity": 1.0, "limit": 1.0}], "score": 0.5,
        "horizon_s": 60.0, "expected_contention_s": 30.0, "reasons": ["x"],
        "trigger": {"state": "quiet", "start_score": 0.5, "stop_score": 0.5, "cooldown_until_unix_ms": 1,
            "latest_start_unix_ms": 1}, "calibration_error": 0.5, "fallback": "x",
        "at_risk": [{"machine": "vm1", "resource": "cpu", "probability": 0.5, "reason": "x"}], "computed_unix_ms": 1})
}

fn balloon() -> Value {
    let figures = [
        "swap_in_bytes",
        "swap_out_bytes",
        "major_faults",
        "minor_faults",
        "free_bytes",
        "total_bytes",
        "available_bytes",
        "cached_bytes",
    ];
    let statistics: BTreeMap<&str, u64> = figures.into_iter().map(|figure| (figure, 1)).collect();
    json!({"target_bytes": 1, "actual_bytes": 1, "inflated_bytes": 1, "reported_bytes": 1, "hinted_bytes": 1,
        "statistics": statistics})
}

fn new_event() -> Value {
    json!({"name": "x", "target": {"machine": "vm1"}, "starts_unix_ms": 1, "starts_in_s": 1.0, "duration_s": 1.0,
        "repeats": "FREQ=DAILY", "adds": usage(), "confidence": 0.9})
}

fn event() -> Value {
    json!({"id": "evt-1", "name": "x", "target": {"pool": "a"}, "starts_unix_ms": 1, "ends_unix_ms": 2, "adds": usage(),
        "repeats": "FREQ=DAILY", "confidence": 0.9, "declared_at": "a1"})
}

fn plan() -> Value {
    json!({"id": "plan-1", "at_unix_ms": 1, "pool": "a", "planner": "a1", "score": 0.5, "horizon_s": 60.0, "machine": "vm1",
        "source": "a1", "destination": "b1", "reasons": ["x"], "migration": "mig-1", "latest_start_unix_ms": 1, "outcome": "started",
        "candidates": [{"machine": "vm1", "source": "a1", "destination": "b1", "benefit_minutes": 1.0, "cost_bytes": 1.0,
            "predicted_total_ms": 1.0, "predicted_downtime_ms": 1.0, "reason": "x"}]})
}

fn audit_record() -> Value {
    json!({"sequence": 1, "at_unix_ms": 1, "actor": "uid:0", "action": "create", "object": "machine:vm1", "decision": "allowed",
        "detail": "x", "previous": "00", "hash": "00"})
}

fn migration() -> Value {
    json!({"id": "mig-1", "machine": "vm1", "source": "a1", "destination": "b1", "side": "source", "stage": "transferring",
        "trigger": trigger(), "started_unix_ms": 1, "ended_unix_ms": 2, "error": "x", "warning": "x", "report": report(),
        "limits": limits(), "pause_before_switchover": true, "on_failed_probe": "alarm", "attempt": 1, "retries_left": 1,
        "retry_at_unix_ms": 1, "failures": [{"at_unix_ms": 1, "error": "x"}], "alarm": "x", "returned_by": "mig-2", "taken_back": "mig-1",
        "progress": {"id": "mig-1", "phase": "precopy", "committed": false, "round": 1, "bytes_done": 1, "bytes_remaining": 1,
            "bytes_per_second": 1.0, "dirty_bytes_per_second": 1.0, "throttle_percent": 1, "waiting": true, "lost": true, "bandwidth_bytes_per_second": 1, "expected_remaining_ms": 1.0, "report": report(), "error": "x"}})
}

fn guest_rates() -> Value {
    json!({"vcpu_cores": 1.0, "disk_bytes_per_second": 1.0, "network_bytes_per_second": 1.0})
}

fn report() -> Value {
    json!({"id": "mig-1", "machine": "vm1", "source": "a1", "destination": "b1", "mode": "precopy", "outcome": "completed",
        "reason": "x", "transient": true, "total_ms": 1.0, "paused_unix_ms": 1.0,
        "downtime_ms": {"pause": 1.0, "final_pages": 1.0, "final_blocks": 1.0, "state": 1.0, "commit": 1.0, "resume": 1.0, "total": 1.0},
        "network_gap_ms": 1.0, "rounds": [{"pages": 1, "bytes": 1, "zero_pages": 1, "ms": 1.0, "dirty_pages_after": 1}],
        "memory": {"bytes_sent": 1, "pages_total": 1, "pages_zero": 1, "pages_delta": 1, "throughput_bytes_per_second": 1.0},
        "disk": {"bytes_sent": 1, "bytes_skipped": 1, "bytes_reused": 1, "rounds": 1, "mirrored": 1},
        "postcopy": {"faults": 1, "fault_us_p50": 1.0, "fault_us_p99": 1.0, "pushed_pages": 1, "recoveries": 1},
        "throttle_percent_max": 1, "throttled": [{"vcpu": 0, "percent_max": 1, "held_ms": 1.0}], "warnings": ["x"], "streams": 1, "tls": {"version": "x", "cipher": "x"},
        "verification": {"memory_digest_ok": true, "disk_digest_ok": true, "pages_checked": 1, "pages_overwritten": 1,
            "blocks_checked": 1, "blocks_overwritten": 1, "probes": [{"name": "x", "ok": true, "detail": "x"}],
            "rates": {"before": guest_rates(), "after": guest_rates()}},
        "trigger": trigger()})
}
