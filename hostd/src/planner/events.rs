//! Scheduled events: checks of what is declared, when it comes again, and what of it concerns a pool.

use predictor::recurrence::Rule;
use predictor::{Sample, Scope};

use super::convert::change_of;
use crate::api::types::{Event, EventTarget, NewEvent};
use crate::config::host_name_ok;
use crate::machine::name::machine_ok;

/// Longest event, and furthest start: ten years.
const LONGEST_S: f64 = 315_360_000.0;

/// Most events on one host.
pub const EVENTS_MAX: usize = 1000;

/// Most occurrences that a rule may count.
const COUNT_MAX: u64 = 10_000;

/// Occurrences of one event that are looked at in one step; beyond, the nearest ones count.
const OCCURRENCES_MAX: usize = 1_500;

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
    let repeats = new.repeats.map(|text| rule(&text, new.duration_s).map(|_| text.trim().to_owned())).transpose()?;
    let over = last_end_unix_ms(repeats.as_deref(), starts_unix_ms, ends_unix_ms);
    if over.is_some_and(|over| over <= now_unix_ms) {
        return Err("the event is over already: give a time to come".to_owned());
    }
    Ok(Event {
        id,
        name: new.name,
        target: new.target,
        starts_unix_ms,
        ends_unix_ms,
        repeats,
        adds,
        confidence: new.confidence,
        declared_at: host.to_owned(),
    })
}

/// The rule of an event that lasts so long.
fn rule(text: &str, duration_s: f64) -> Result<Rule, String> {
    let rule: Rule = text.parse().map_err(|error| format!("repeats: {error}"))?;
    if rule.count().is_some_and(|count| count > COUNT_MAX) {
        return Err(format!(
            "repeats: COUNT is at most {COUNT_MAX}; leave it out for an event without end, or use UNTIL"
        ));
    }
    let gap_s = rule.shortest_gap_s();
    if duration_s > gap_s as f64 {
        return Err(format!(
            "repeats: it comes again after {gap_s} s and lasts {duration_s} s: make it shorter, or the rule rarer"
        ));
    }
    Ok(rule)
}

/// When an event is over for good; `None` for one without end.
fn last_end_unix_ms(repeats: Option<&str>, starts_unix_ms: u64, ends_unix_ms: u64) -> Option<u64> {
    // What was stored was read before: one that cannot be read any more does not come again.
    let Some(rule) = repeats.and_then(|text| text.parse::<Rule>().ok()) else { return Some(ends_unix_ms) };
    let start_s = i64::try_from(starts_unix_ms / 1000).unwrap_or(i64::MAX);
    let last_s = u64::try_from(rule.last_start_s(start_s)?).unwrap_or(0);
    Some(last_s.saturating_mul(1000).saturating_add(ends_unix_ms.saturating_sub(starts_unix_ms)).max(ends_unix_ms))
}

/// Whether an event has been over for good for so long.
pub fn is_over(event: &Event, since_ms: u64, now_unix_ms: u64) -> bool {
    last_end_unix_ms(event.repeats.as_deref(), event.starts_unix_ms, event.ends_unix_ms)
        .is_some_and(|end| end.saturating_add(since_ms) < now_unix_ms)
}

/// The events with every occurrence that is due, or starts within `ahead_s`, as an event of its own.
pub fn occurrences(declared: &[Event], now_unix_ms: u64, ahead_s: f64) -> Vec<Event> {
    let mut all = Vec::with_capacity(declared.len());
    for event in declared {
        let Some(rule) = event.repeats.as_deref().and_then(|text| text.parse::<Rule>().ok()) else {
            all.push(event.clone());
            continue;
        };
        let lasts_ms = event.ends_unix_ms.saturating_sub(event.starts_unix_ms);
        let seconds = |ms: u64| i64::try_from(ms / 1000).unwrap_or(i64::MAX);
        // What should be over may still go on: it is kept for once more its length.
        let from_s = seconds(now_unix_ms.saturating_sub(2 * lasts_ms));
        let to_s = seconds(now_unix_ms).saturating_add(ahead_s.clamp(0.0, LONGEST_S) as i64).saturating_add(1);
        let starts = rule.between(seconds(event.starts_unix_ms), from_s, to_s).into_iter().take(OCCURRENCES_MAX);
        all.extend(starts.filter_map(|start_s| {
            let starts_unix_ms = u64::try_from(start_s).ok()?.saturating_mul(1000) + event.starts_unix_ms % 1000;
            let ends_unix_ms = starts_unix_ms.saturating_add(lasts_ms);
            Some(Event {
                id: format!("{}@{start_s}", event.id),
                starts_unix_ms,
                ends_unix_ms,
                repeats: None,
                ..event.clone()
            })
        }));
    }
    all
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
        let cases: [(Change, &str); 13] = [
            (|json| json["starts_unix_ms"] = 5.into(), "either starts_unix_ms or starts_in_s"),
            (|json| json["starts_in_s"] = (-1).into(), "starts_in_s"),
            (|json| json["duration_s"] = 0.into(), "duration_s"),
            (|json| json["adds"] = serde_json::json!({}), "at least one of"),
            (|json| json["adds"] = serde_json::json!({"cpu": 1}), "unknown field"),
            (|json| json["confidence"] = 2.into(), "confidence"),
            (|json| json["target"] = serde_json::json!({"machine": "../x"}), "target.machine"),
            (|json| json["name"] = "".into(), "name"),
            (|json| json["repeats"] = "every day".into(), "repeats: the rule is not of the form FREQ=DAILY"),
            (|json| json["repeats"] = "FREQ=YEARLY".into(), "repeats: FREQ=YEARLY is not supported: use FREQ"),
            (|json| json["repeats"] = "FREQ=DAILY;COUNT=10001".into(), "COUNT is at most 10000"),
            (|json| json["repeats"] = "FREQ=DAILY;UNTIL=19700101T000000Z;COUNT=2".into(), "exclude each other"),
            (
                |json| {
                    json["repeats"] = "FREQ=MINUTELY".into();
                    json["duration_s"] = 61.into();
                },
                "comes again after 60 s and lasts 61 s",
            ),
        ];
        for (change, expected) in cases {
            let error = declare(change).unwrap_err();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    #[test]
    fn an_event_comes_again_by_its_rule_and_is_over_after_its_last_time() {
        const DAY_MS: u64 = 86_400_000;
        let daily = declare(|json| json["repeats"] = " RRULE:FREQ=DAILY;COUNT=3 ".into()).unwrap();
        assert_eq!(daily.repeats.as_deref(), Some("RRULE:FREQ=DAILY;COUNT=3"));
        let starts = |now: u64, ahead_s: f64| {
            let all = occurrences(std::slice::from_ref(&daily), now, ahead_s);
            assert!(
                all.iter().all(|event| event.ends_unix_ms - event.starts_unix_ms == 30_000 && event.repeats.is_none())
            );
            all.iter().map(|event| event.starts_unix_ms).collect::<Vec<_>>()
        };
        let first = daily.starts_unix_ms;
        assert_eq!(starts(1_000_000, 3_600.0), [first]);
        assert_eq!(starts(1_000_000, 2.5 * 86_400.0), [first, first + DAY_MS, first + 2 * DAY_MS]);
        assert_eq!(starts(first + DAY_MS + 31_000, 60.0), [first + DAY_MS], "it may still go on");
        assert_eq!(starts(first + 3 * DAY_MS, 86_400.0), [0; 0]);
        assert!(!is_over(&daily, 1_000, first + 2 * DAY_MS));
        assert!(is_over(&daily, 1_000, first + 2 * DAY_MS + 32_000));
        let endless = declare(|json| json["repeats"] = "FREQ=MINUTELY".into()).unwrap();
        assert!(!is_over(&endless, 0, u64::MAX));
        let most = occurrences(std::slice::from_ref(&endless), 1_000_000_000, 1e300);
        assert_eq!(most.len(), OCCURRENCES_MAX, "what is looked at is bounded");
        let once = declare(|_| ()).unwrap();
        assert_eq!(occurrences(std::slice::from_ref(&once), 1, 1.0), std::slice::from_ref(&once));
        assert!(is_over(&once, 0, once.ends_unix_ms + 1));
        let past = declare(|json| json["repeats"] = "FREQ=DAILY;UNTIL=19700101".into());
        assert!(past.is_ok(), "{past:?}");
        let new = |text: &str| {
            serde_json::json!({"name": "x", "target": {"pool": "a"}, "starts_unix_ms": 1_000, "duration_s": 1,
            "adds": {"cpu_cores": 1.0}, "repeats": text})
        };
        let late = |text: &str| accept(serde_json::from_value(new(text)).unwrap(), "evt-2".into(), "a1", 10 * DAY_MS);
        assert!(late("FREQ=DAILY").is_ok(), "its next time is to come");
        assert!(late("FREQ=DAILY;COUNT=2").is_err_and(|error| error.contains("over already")));
    }

    #[test]
    fn a_machines_event_goes_where_the_machine_is() {
        let event = declare(|_| ()).unwrap();
        let there = [Sample { machine: "vm1".into(), ..Sample::default() }];
        assert_eq!(for_pool("a", &there, std::slice::from_ref(&event)).len(), 1);
        assert_eq!(for_pool("b", &[], &[event]).len(), 0);
    }
}
