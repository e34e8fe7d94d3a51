//! Scheduled events: checks of what is declared, and what of it concerns a pool.

use predictor::{Sample, Scope};

use super::convert::change_of;
use crate::api::types::{Event, EventTarget, NewEvent};
use crate::config::host_name_ok;
use crate::machine::name::machine_ok;

/// Longest event, and furthest start: ten years.
const LONGEST_S: f64 = 315_360_000.0;

/// Most events on one host.
pub const EVENTS_MAX: usize = 1000;

/// Turns a declaration into an event.
///
/// # Errors
///
/// What is wrong with it and what to do.
pub fn accept(new: NewEvent, id: String, host: &str, now_unix_ms: u64) -> Result<Event, String> {
    if new.name.is_empty() || new.name.len() > 128 || new.name.chars().any(char::is_control) {
        return Err("name: use 1 to 128 printable characters".to_owned());
    }
    match &new.target {
        EventTarget::Machine(name) if !machine_ok(name) => return Err("target.machine: not a machine name".to_owned()),
        EventTarget::Pool(name) if !host_name_ok(name) => return Err("target.pool: not a pool name".to_owned()),
        EventTarget::Machine(_) | EventTarget::Pool(_) => {}
    }
    let starts_unix_ms = match (new.starts_unix_ms, new.starts_in_s) {
        (Some(at), None) => at,
        (None, Some(seconds)) if (0.0..=LONGEST_S).contains(&seconds) => now_unix_ms + (seconds * 1000.0) as u64,
        (None, Some(seconds)) => return Err(format!("starts_in_s {seconds}: use 0 to {LONGEST_S}")),
        _ => return Err("give either starts_unix_ms or starts_in_s".to_owned()),
    };
    if !(new.duration_s > 0.0 && new.duration_s <= LONGEST_S) {
        return Err(format!("duration_s {}: use more than 0 and at most {LONGEST_S}", new.duration_s));
    }
    if !(new.confidence > 0.0 && new.confidence <= 1.0) {
        return Err(format!("confidence {}: use more than 0 and at most 1", new.confidence));
    }
    let adds = new.adds;
    let values = [adds.cpu_cores, adds.memory_mib, adds.disk_bytes_per_second, adds.network_bytes_per_second];
    if values.iter().any(|value| !value.is_finite() || value.abs() > 1e15) || values.iter().all(|value| *value == 0.0) {
        return Err(
            "adds: give at least one of cpu_cores, memory_mib, disk_bytes_per_second, network_bytes_per_second"
                .to_owned(),
        );
    }
    let ends_unix_ms = starts_unix_ms.saturating_add((new.duration_s * 1000.0) as u64);
    if ends_unix_ms <= now_unix_ms {
        return Err("the event is over already: give a time to come".to_owned());
    }
    Ok(Event {
        id,
        name: new.name,
        target: new.target,
        starts_unix_ms,
        ends_unix_ms,
        adds,
        confidence: new.confidence,
        declared_at: host.to_owned(),
    })
}

/// The events that concern a pool or a machine in it, in the predictor's words.
pub fn for_pool(pool: &str, samples: &[Sample], declared: &[Event]) -> Vec<predictor::Event> {
    let concerns = |event: &&Event| match &event.target {
        EventTarget::Pool(name) => name == pool,
        EventTarget::Machine(name) => samples.iter().any(|sample| &sample.machine == name),
    };
    let convert = |event: &Event| predictor::Event {
        id: event.id.clone(),
        name: event.name.clone(),
        scope: match &event.target {
            EventTarget::Pool(_) => Scope::Pool,
            EventTarget::Machine(name) => Scope::Machine(name.clone()),
        },
        start_s: event.starts_unix_ms as f64 / 1000.0,
        end_s: event.ends_unix_ms as f64 / 1000.0,
        change: change_of(&event.adds),
        confidence: event.confidence,
    };
    declared.iter().filter(concerns).map(convert).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn declare(change: impl FnOnce(&mut serde_json::Value)) -> Result<Event, String> {
        let mut json = serde_json::json!({"name": "report", "target": {"machine": "vm1"}, "starts_in_s": 60.0,
            "duration_s": 30.0, "adds": {"cpu_cores": 1.0}});
        change(&mut json);
        let new: NewEvent = serde_json::from_value(json).map_err(|error| error.to_string())?;
        accept(new, "evt-1".into(), "a1", 1_000_000)
    }

    #[test]
    fn an_event_has_a_time_and_an_effect() {
        let event = declare(|_| ()).unwrap();
        assert_eq!((event.starts_unix_ms, event.ends_unix_ms, event.confidence), (1_060_000, 1_090_000, 0.9));
        type Change = fn(&mut serde_json::Value);
        let cases: [(Change, &str); 8] = [
            (|json| json["starts_unix_ms"] = 5.into(), "either starts_unix_ms or starts_in_s"),
            (|json| json["starts_in_s"] = (-1).into(), "starts_in_s"),
            (|json| json["duration_s"] = 0.into(), "duration_s"),
            (|json| json["adds"] = serde_json::json!({}), "at least one of"),
            (|json| json["adds"] = serde_json::json!({"cpu": 1}), "unknown field"),
            (|json| json["confidence"] = 2.into(), "confidence"),
            (|json| json["target"] = serde_json::json!({"machine": "../x"}), "target.machine"),
            (|json| json["name"] = "".into(), "name"),
        ];
        for (change, expected) in cases {
            let error = declare(change).unwrap_err();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    #[test]
    fn a_machines_event_goes_where_the_machine_is() {
        let event = declare(|_| ()).unwrap();
        let there = [Sample { machine: "vm1".into(), ..Sample::default() }];
        assert_eq!(for_pool("a", &there, std::slice::from_ref(&event)).len(), 1);
        assert_eq!(for_pool("b", &[], &[event]).len(), 0);
    }
}
