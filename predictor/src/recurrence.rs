//! Events that come again: the part of RFC 5545's recurrence rules that batch jobs and campaigns use.
//!
//! Understood: `FREQ` of `MINUTELY`, `HOURLY`, `DAILY` and `WEEKLY`, `INTERVAL`, `COUNT`, `UNTIL` in UTC, and `BYDAY` without numbers for
//! `DAILY` and `WEEKLY` (weeks start on Monday, the default). All times are UTC, so that a day always has 24 hours. Months and years, whose
//! lengths differ, and everything else are refused by name and not silently ignored: a rule that means something else than it says
//! would move machines at the wrong time.

use crate::events::Event;
use serde::{Deserialize, Serialize};
use std::str::FromStr;
use thiserror::Error;

const DAY_S: i64 = 86_400;
/// Occurrences that one question returns at most.
pub const MOST_OCCURRENCES: usize = 10_000;
/// Periods that one question looks at: a rule such as every seventh day on a Monday may never happen.
const MOST_PERIODS: i64 = 1_000_000;
/// The longest rule in bytes that is read.
const LONGEST: usize = 1_024;
/// Weekdays as RFC 5545 writes them, from Monday.
const WEEKDAYS: [&str; 7] = ["MO", "TU", "WE", "TH", "FR", "SA", "SU"];

/// Why a rule cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RuleError {
    /// It is too long, or no list of `NAME=VALUE`.
    #[error("the rule is not of the form FREQ=DAILY;INTERVAL=1;...: correct it near {0:?}")]
    Form(String),
    /// A part is not understood.
    #[error(
        "{0} is not supported: use FREQ, INTERVAL, COUNT, UNTIL and BYDAY, with FREQ of MINUTELY, HOURLY, DAILY or WEEKLY"
    )]
    Unsupported(String),
    /// A value is not what the part takes.
    #[error("{part} cannot be {value:?}: {expected}")]
    Value {
        /// The part.
        part: &'static str,
        /// Its value.
        value: String,
        /// What it takes.
        expected: &'static str,
    },
    /// `COUNT` and `UNTIL` exclude each other (RFC 5545, 3.3.10).
    #[error("COUNT and UNTIL exclude each other: leave one out")]
    Both,
}

/// A rule: how often, and until when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Seconds from one period to the next.
    period_s: i64,
    /// Weekdays on which it happens, Monday first; all false = that of the start, or any.
    weekdays: [bool; 7],
    weekly: bool,
    count: Option<u64>,
    until_s: Option<i64>,
}

fn number(part: &'static str, value: &str) -> Result<i64, RuleError> {
    let expected = "give a number from 1 to 100000";
    let wrong = || RuleError::Value { part, value: value.to_owned(), expected };
    value.parse().ok().filter(|number| (1..=100_000).contains(number)).ok_or_else(wrong)
}

/// `20261231T235959Z` or `20261231` as Unix seconds; the day counts to its end.
fn time(value: &str) -> Option<i64> {
    let digits = |from: usize, to: usize| -> Option<i64> {
        let part = value.get(from..to)?;
        part.bytes().all(|byte| byte.is_ascii_digit()).then(|| part.parse().ok())?
    };
    let (year, month, day) = (digits(0, 4)?, digits(4, 6)?, digits(6, 8)?);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let lengths = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let length = *lengths.get(usize::try_from(month - 1).ok()?)?;
    if !(1..=length).contains(&day) || year < 1970 {
        return None;
    }
    let before = |year: i64| 365 * year + (year + 3) / 4 - (year + 99) / 100 + (year + 399) / 400;
    let months: i64 = lengths[..usize::try_from(month - 1).ok()?].iter().sum();
    let days = before(year) - before(1970) + months + day - 1;
    match value.len() {
        8 => Some(days * DAY_S + DAY_S - 1),
        16 if value.as_bytes()[8] == b'T' && value.ends_with('Z') => {
            let (hour, minute, second) = (digits(9, 11)?, digits(11, 13)?, digits(13, 15)?);
            (hour < 24 && minute < 60 && second < 61).then_some(days * DAY_S + hour * 3_600 + minute * 60 + second)
        }
        _ => None,
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let text = text.trim();
        let text = text.strip_prefix("RRULE:").unwrap_or(text);
        if text.len() > LONGEST {
            return Err(RuleError::Form(text.chars().take(20).collect()));
        }
        let (mut unit_s, mut interval) = (None, 1);
        let mut rule = Self { period_s: DAY_S, weekdays: [false; 7], weekly: false, count: None, until_s: None };
        for part in text.split(';') {
            let (name, value) = part.split_once('=').ok_or_else(|| RuleError::Form(part.to_owned()))?;
            match name.trim().to_ascii_uppercase().as_str() {
                "FREQ" => unit_s = Some(frequency(value)?),
                "INTERVAL" => interval = number("INTERVAL", value)?,
                "COUNT" => rule.count = Some(number("COUNT", value)?.unsigned_abs()),
                "UNTIL" => {
                    let expected = "give UTC as 20261231T235959Z, or a day as 20261231";
                    let wrong = || RuleError::Value { part: "UNTIL", value: value.to_owned(), expected };
                    rule.until_s = Some(time(value.trim()).ok_or_else(wrong)?);
                }
                "BYDAY" => rule.weekdays = weekdays(value)?,
                "WKST" if value.trim().eq_ignore_ascii_case("MO") => {}
                other => return Err(RuleError::Unsupported(other.to_owned())),
            }
        }
        let unit_s = unit_s.ok_or_else(|| RuleError::Form(text.to_owned()))?;
        rule.weekly = unit_s == 7 * DAY_S;
        rule.period_s = unit_s * interval;
        if rule.weekdays.contains(&true) && unit_s < DAY_S {
            return Err(RuleError::Unsupported("BYDAY with HOURLY or MINUTELY".to_owned()));
        }
        if rule.count.is_some() && rule.until_s.is_some() {
            return Err(RuleError::Both);
        }
        Ok(rule)
    }
}

fn frequency(value: &str) -> Result<i64, RuleError> {
    match value.trim().to_ascii_uppercase().as_str() {
        "MINUTELY" => Ok(60),
        "HOURLY" => Ok(3_600),
        "DAILY" => Ok(DAY_S),
        "WEEKLY" => Ok(7 * DAY_S),
        other => Err(RuleError::Unsupported(format!("FREQ={other}"))),
    }
}

fn weekdays(value: &str) -> Result<[bool; 7], RuleError> {
    let mut days = [false; 7];
    for day in value.split(',') {
        let day = day.trim().to_ascii_uppercase();
        let expected = "give weekdays without numbers: MO,TU,WE,TH,FR,SA,SU";
        let wrong = || RuleError::Value { part: "BYDAY", value: day.clone(), expected };
        days[WEEKDAYS.iter().position(|known| *known == day).ok_or_else(wrong)?] = true;
    }
    Ok(days)
}

/// 0 = Monday; day 0 of Unix time was a Thursday.
fn weekday(at_s: i64) -> usize {
    (at_s.div_euclid(DAY_S) + 3).rem_euclid(7) as usize
}

impl Rule {
    /// The shortest time from one occurrence to the next that is possible, in seconds.
    #[must_use]
    pub fn shortest_gap_s(&self) -> i64 {
        if self.weekdays.contains(&true) { DAY_S.min(self.period_s) } else { self.period_s }
    }

    /// No occurrence starts after this, in Unix seconds; `None` if it never ends. `start_s` as in [`Rule::between`].
    #[must_use]
    pub fn last_start_s(&self, start_s: i64) -> Option<i64> {
        let last = |count: u64| {
            // Named days come at least once a week or a period, whichever is longer.
            let longest = self.period_s.max(7 * DAY_S);
            let far = start_s.saturating_add(longest.saturating_mul(i64::try_from(count).unwrap_or(i64::MAX)));
            self.between(start_s, start_s, far.saturating_add(1)).last().copied().unwrap_or(start_s)
        };
        match (self.count, self.until_s) {
            (Some(count), _) => Some(last(count)),
            (None, until) => until.map(|until| until.max(start_s)),
        }
    }

    /// How often it happens, if that is told.
    #[must_use]
    pub fn count(&self) -> Option<u64> {
        self.count
    }

    /// The occurrences from `from_s` until before `to_s` of what first happened at `start_s`, all in Unix seconds; at most
    /// [`MOST_OCCURRENCES`]. The start counts as the first one, also where `BYDAY` does not name its day (RFC 5545, 3.8.5.3).
    #[must_use]
    pub fn between(&self, start_s: i64, from_s: i64, to_s: i64) -> Vec<i64> {
        let mut found = Vec::new();
        let to_s = self.until_s.map_or(to_s, |until| to_s.min(until.saturating_add(1)));
        // Without a count, periods before the question can be skipped; one is kept for the days of a week that began earlier.
        let skipped = if self.count.is_some() { 0 } else { ((from_s - start_s) / self.period_s - 1).max(0) };
        let mut number = u64::from(skipped == 0);
        let mut visit = |at_s: i64, first: bool| {
            let past = self.count.is_some_and(|count| number > count);
            if !past && at_s >= from_s && at_s < to_s && found.len() < MOST_OCCURRENCES {
                found.push(at_s);
            }
            if !first || at_s == start_s {
                number += 1;
            }
            !past && at_s < to_s && found.len() < MOST_OCCURRENCES
        };
        if skipped == 0 && !visit(start_s, true) {
            return found;
        }
        let any = !self.weekdays.contains(&true);
        let monday_s = start_s - weekday(start_s) as i64 * DAY_S;
        for period in skipped..skipped.saturating_add(MOST_PERIODS) {
            let at_s = start_s.saturating_add(period.saturating_mul(self.period_s));
            let goes_on = if any {
                at_s == start_s || visit(at_s, false)
            } else if self.weekly {
                let week_s = monday_s.saturating_add(period.saturating_mul(self.period_s));
                let days = (0..7).filter(|day| self.weekdays[*day]).map(|day| week_s + day as i64 * DAY_S);
                let mut later = days.filter(|day_s| *day_s > start_s);
                later.all(|day_s| visit(day_s, false)) && week_s < to_s
            } else {
                let named = self.weekdays[weekday(at_s)] && at_s != start_s;
                (!named || visit(at_s, false)) && at_s < to_s
            };
            if !goes_on {
                break;
            }
        }
        found
    }
}

/// The occurrences of a recurring event that are due, or start within `ahead_s` of `now_s`, on a clock of Unix seconds: each an event of
/// its own with the id `id@start`, all of one name, so that they learn from each other.
#[must_use]
pub fn expand(event: &Event, rule: &Rule, now_s: f64, ahead_s: f64) -> Vec<Event> {
    let lasts_s = event.end_s - event.start_s;
    let far = 1e15;
    if !(lasts_s > 0.0 && now_s.abs() < far && ahead_s.abs() < far && event.start_s.abs() < far && lasts_s < far) {
        return Vec::new();
    }
    // What should be over may still be fading: it is kept for once more its length.
    let from_s = now_s - 2.0 * lasts_s;
    let starts = rule.between(event.start_s as i64, from_s as i64, (now_s + ahead_s) as i64 + 1);
    let one = |start_s: i64| Event {
        id: format!("{}@{start_s}", event.id),
        start_s: start_s as f64,
        end_s: start_s as f64 + lasts_s,
        ..event.clone()
    };
    starts.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Scope;
    use crate::sample::PerResource;

    /// Tuesday, 2026-11-24, 02:00 UTC.
    const START: i64 = 1_795_485_600;

    fn days(rule: &str, from: i64, to: i64) -> Vec<i64> {
        let rule: Rule = rule.parse().expect("a rule");
        rule.between(START, START + from * DAY_S, START + to * DAY_S).iter().map(|at| (at - START) / DAY_S).collect()
    }

    #[test]
    fn days_weeks_counts_and_ends() {
        assert_eq!(time("20261124T020000Z"), Some(START));
        assert_eq!(weekday(START), 1);
        assert_eq!(days("FREQ=DAILY", 0, 4), [0, 1, 2, 3]);
        assert_eq!(days("RRULE:FREQ=DAILY;INTERVAL=3", 100, 110), [102, 105, 108]);
        assert_eq!(days("FREQ=DAILY;COUNT=3", 0, 100), [0, 1, 2]);
        assert_eq!(days("FREQ=DAILY;UNTIL=20261126T020000Z", 0, 100), [0, 1, 2], "the end is included");
        assert_eq!(days("FREQ=DAILY;UNTIL=20261126", 0, 100), [0, 1, 2]);
        assert_eq!(days("FREQ=WEEKLY", 0, 15), [0, 7, 14]);
        // Tuesday is the start; Monday, Friday of this week and the next.
        assert_eq!(days("FREQ=WEEKLY;BYDAY=MO,TU,FR", 0, 11), [0, 3, 6, 7, 10]);
        assert_eq!(days("FREQ=WEEKLY;INTERVAL=2;BYDAY=TU,FR", 0, 20), [0, 3, 14, 17]);
        assert_eq!(days("FREQ=WEEKLY;BYDAY=MO,FR;COUNT=3", 0, 60), [0, 3, 6], "the start counts");
        assert_eq!(days("FREQ=DAILY;BYDAY=SA,SU", 1, 13), [4, 5, 11, 12]);
        assert_eq!(days("FREQ=WEEKLY;BYDAY=FR", 700, 708), [703], "far ahead without counting from the start");
        let hourly: Rule = "FREQ=HOURLY;INTERVAL=6;COUNT=3".parse().expect("a rule");
        assert_eq!(hourly.between(0, 0, DAY_S * 9), [0, 21_600, 43_200]);
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        for (rule, named) in [
            ("FREQ=MONTHLY", "FREQ=MONTHLY"),
            ("FREQ=DAILY;BYMONTH=1", "BYMONTH"),
            ("FREQ=WEEKLY;BYDAY=1MO", "BYDAY"),
            ("FREQ=HOURLY;BYDAY=MO", "BYDAY"),
            ("FREQ=DAILY;INTERVAL=0", "INTERVAL"),
            ("FREQ=DAILY;UNTIL=20260231", "UNTIL"),
            ("FREQ=DAILY;COUNT=2;UNTIL=20270101", "exclude each other"),
            ("INTERVAL=2", "FREQ"),
            ("daily", "daily"),
            ("", "FREQ"),
        ] {
            let error = rule.parse::<Rule>().expect_err(rule).to_string();
            assert!(error.contains(named), "{rule}: {error}");
        }
    }

    #[test]
    fn answers_are_bounded_and_events_are_expanded_one_by_one() {
        let every_minute: Rule = "FREQ=MINUTELY".parse().expect("a rule");
        assert_eq!(every_minute.between(0, 0, i64::MAX).len(), MOST_OCCURRENCES);
        let never: Rule = "FREQ=DAILY;INTERVAL=7;BYDAY=MO".parse().expect("a rule");
        assert_eq!(never.between(START, START + 1, i64::MAX), [] as [i64; 0]);
        let backup = Event {
            id: "backup".into(),
            name: "backup".into(),
            scope: Scope::Pool,
            start_s: START as f64,
            end_s: START as f64 + 3_600.0,
            change: PerResource::default(),
            confidence: 0.9,
        };
        let daily: Rule = "FREQ=DAILY".parse().expect("a rule");
        let now_s = (START + 10 * DAY_S + 1_800) as f64;
        let found = expand(&backup, &daily, now_s, 86_400.0);
        let ids: Vec<String> = (10..12).map(|day| format!("backup@{}", START + day * DAY_S)).collect();
        assert_eq!(found.iter().map(|event| event.id.clone()).collect::<Vec<_>>(), ids);
        assert!(found.iter().all(|event| event.end_s - event.start_s == 3_600.0));
        assert!(expand(&backup, &daily, f64::NAN, 1.0).is_empty());
    }
}
