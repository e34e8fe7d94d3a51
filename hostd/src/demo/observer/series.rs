//! Requests and replies of one target, and what follows from them: pure functions of recorded times.

use std::ops::Range;

use serde::Serialize;

/// After so many nanoseconds a request without a reply counts as lost.
pub const LOST_AFTER_NS: u64 = 1_000_000_000;

/// Send and arrival times by sequence number, in nanoseconds.
#[derive(Clone, Debug, Default)]
pub struct Series {
    sent: Vec<u64>,
    /// 0 = no reply yet.
    arrived: Vec<u64>,
    /// Replies to a request that had been answered already.
    duplicates: u64,
    /// Datagrams that are no reply to anything that was sent.
    strangers: u64,
}

/// What a client saw in a window of time.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct UdpSummary {
    /// Requests sent in the window.
    pub sent: u64,
    /// Of these, answered (at any time).
    pub answered: u64,
    /// Of these, not answered within a second.
    pub lost: u64,
    /// Replies that came twice, over all time.
    pub duplicates: u64,
    /// Datagrams that answered nothing, over all time.
    pub strangers: u64,
    /// Longest time between the arrivals of two consecutive replies.
    pub gap_ms: f64,
    /// When that silence began, in nanoseconds since the start of the observer.
    pub gap_start_ns: u64,
    /// Longest of these silences that overlaps the downtime, once it is known when that was.
    pub downtime_gap_ms: Option<f64>,
    /// Longest time between the sends of two answered requests, however late the answers, with lost ones in between.
    pub outage_ms: f64,
    /// Longest time between two consecutive sends: the observer's own stall.
    pub send_stall_ms: f64,
    /// Median round-trip time.
    pub rtt_p50_us: f64,
    /// 99th percentile.
    pub rtt_p99_us: f64,
    /// Longest.
    pub rtt_max_us: f64,
}

impl Series {
    /// Notes a send and returns its sequence number.
    pub fn send(&mut self, at: u64) -> u64 {
        self.sent.push(at);
        self.arrived.push(0);
        self.sent.len() as u64 - 1
    }

    /// Notes the arrival of a reply.
    pub fn arrive(&mut self, sequence: u64, at: u64) {
        let slot = usize::try_from(sequence).ok().and_then(|index| self.arrived.get_mut(index));
        match slot {
            Some(slot) if *slot == 0 => *slot = at.max(1),
            Some(_) => self.duplicates += 1,
            None => self.strangers += 1,
        }
    }

    /// Notes a datagram that could not be read as a reply.
    pub fn stranger(&mut self) {
        self.strangers += 1;
    }

    /// Requests sent so far.
    pub fn len(&self) -> usize {
        self.sent.len()
    }

    /// Whether nothing was sent yet.
    pub fn is_empty(&self) -> bool {
        self.sent.is_empty()
    }

    /// What was seen in `window`, known at `now`.
    pub fn summary(&self, window: Range<u64>, now: u64) -> UdpSummary {
        let mut summary =
            UdpSummary { duplicates: self.duplicates, strangers: self.strangers, ..UdpSummary::default() };
        let first = self.sent.partition_point(|sent| *sent < window.start);
        let last = self.sent.partition_point(|sent| *sent < window.end);
        let mut rtts = Vec::with_capacity(last - first);
        for (sent, arrived) in self.sent[first..last].iter().zip(&self.arrived[first..last]) {
            summary.sent += 1;
            if *arrived != 0 {
                summary.answered += 1;
                rtts.push(arrived.saturating_sub(*sent));
            } else if now.saturating_sub(*sent) > LOST_AFTER_NS {
                summary.lost += 1;
            }
        }
        summary.send_stall_ms = longest(&self.sent[first..last]).1 as f64 / 1e6;
        rtts.sort_unstable();
        summary.rtt_p50_us = percentile(&rtts, 50) as f64 / 1e3;
        summary.rtt_p99_us = percentile(&rtts, 99) as f64 / 1e3;
        summary.rtt_max_us = rtts.last().copied().unwrap_or(0) as f64 / 1e3;
        summary.outage_ms = self.outage(first..last, window.end.min(now)) as f64 / 1e6;
        let (start, gap) = self.gap(&window);
        (summary.gap_start_ns, summary.gap_ms) = (start, gap as f64 / 1e6);
        summary
    }

    /// Longest time between the sends of two answered requests with lost ones in between; `requests` are those of a window that
    /// ends at `end`. Requests at its end that may still be answered do not count.
    fn outage(&self, requests: Range<usize>, end: u64) -> u64 {
        let (mut last_answered, mut lost, mut longest) = (None, false, 0);
        for (sent, arrived) in self.sent[requests.clone()].iter().zip(&self.arrived[requests]) {
            if *arrived == 0 {
                lost = true;
                continue;
            }
            if let Some(before) = last_answered.replace(*sent).filter(|_| lost) {
                longest = longest.max(sent.saturating_sub(before));
            }
            lost = false;
        }
        // Silent to the end, and for longer than an answer may take.
        let silent = last_answered.map_or(0, |last| end.saturating_sub(last));
        if lost && silent > LOST_AFTER_NS { longest.max(silent) } else { longest }
    }

    /// Longest time between two consecutive replies of which a part lies in `window`; `None` without replies on both sides.
    pub fn silence_over(&self, window: &Range<u64>) -> Option<u64> {
        let mut arrivals: Vec<u64> = self.arrived.iter().copied().filter(|at| *at != 0).collect();
        arrivals.sort_unstable();
        let first = arrivals.partition_point(|at| *at <= window.start).checked_sub(1)?;
        let last = arrivals.partition_point(|at| *at < window.end);
        let around = arrivals.get(first..=last)?;
        Some(longest(around).1)
    }

    /// Start and length of the longest silence within the window.
    fn gap(&self, window: &Range<u64>) -> (u64, u64) {
        let mut arrivals: Vec<u64> =
            self.arrived.iter().copied().filter(|at| *at != 0 && window.contains(at)).collect();
        arrivals.sort_unstable();
        // A window that ends in silence: somebody asked after the last reply and has no answer.
        let last = arrivals.last().copied().unwrap_or(window.start);
        let asked = |(sent, arrived): (&u64, &u64)| {
            *sent > last && *sent < window.end && (*arrived == 0 || *arrived >= window.end)
        };
        if self.sent.iter().zip(&self.arrived).any(asked) {
            if arrivals.is_empty() {
                arrivals.push(window.start);
            }
            arrivals.push(window.end);
        }
        longest(&arrivals)
    }
}

/// Start and length of the longest interval between neighbours of an ascending list.
fn longest(times: &[u64]) -> (u64, u64) {
    let intervals = times.windows(2).map(|pair| (pair[0], pair[1].saturating_sub(pair[0])));
    intervals.max_by_key(|(_, length)| *length).unwrap_or((0, 0))
}

/// The smallest value that `percent` of all do not exceed; 0 of none.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// One request a millisecond, answered after 200 us, except those sent within `silent`.
    fn steady(count: u64, silent: Range<u64>) -> Series {
        let mut series = Series::default();
        for n in 1..=count {
            let sequence = series.send(n * MS);
            if !silent.contains(&n) {
                series.arrive(sequence, n * MS + MS / 5);
            }
        }
        series
    }

    #[test]
    fn an_undisturbed_machine_shows_the_pace_of_the_requests() {
        let summary = steady(1000, 0..0).summary(0..1001 * MS, 3000 * MS);
        assert_eq!((summary.sent, summary.answered, summary.lost), (1000, 1000, 0));
        assert!((summary.gap_ms - 1.0).abs() < 1e-9, "{summary:?}");
        assert!((summary.rtt_p50_us - 200.0).abs() < 1e-9);
        assert!((summary.send_stall_ms - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_silence_of_thirty_requests_is_a_gap_of_thirty_one_milliseconds() {
        let summary = steady(1000, 500..530).summary(0..1001 * MS, 3000 * MS);
        assert!((summary.gap_ms - 31.0).abs() < 1e-9, "{summary:?}");
        assert!((summary.outage_ms - 31.0).abs() < 1e-9, "{summary:?}");
        assert_eq!(summary.gap_start_ns, 499 * MS + MS / 5);
        assert_eq!((summary.lost, summary.answered), (30, 970));
    }

    #[test]
    fn requests_that_are_not_a_second_old_are_not_lost_yet() {
        let summary = steady(1000, 990..1001).summary(0..1001 * MS, 1001 * MS);
        assert_eq!(summary.lost, 0);
        assert_eq!(summary.answered, 989);
    }

    #[test]
    fn a_window_that_ends_in_silence_counts_up_to_its_end() {
        let summary = steady(1000, 900..1001).summary(0..1001 * MS, 1001 * MS);
        assert!((summary.gap_ms - 101.8).abs() < 1e-9, "{summary:?}");
    }

    #[test]
    fn a_machine_that_never_answers_is_a_gap_as_long_as_the_window() {
        let summary = steady(100, 0..101).summary(0..200 * MS, 200 * MS);
        assert!((summary.gap_ms - 200.0).abs() < 1e-9, "{summary:?}");
    }

    #[test]
    fn silence_outside_the_window_does_not_count() {
        let series = steady(1000, 100..200);
        assert!((series.summary(300 * MS..1001 * MS, 3000 * MS).gap_ms - 1.0).abs() < 1e-9);
    }

    #[test]
    fn late_replies_in_another_order_are_arrivals_like_any_other() {
        let mut series = steady(10, 4..5);
        series.arrive(3, 7 * MS + MS / 2);
        let summary = series.summary(0..20 * MS, 2000 * MS);
        assert!((summary.gap_ms - 2.0).abs() < 1e-9, "{summary:?}");
        assert_eq!(summary.answered, 10);
    }

    #[test]
    fn the_silence_over_a_moment_is_that_between_the_replies_around_it() {
        let mut series = Series::default();
        for (sent, arrived) in [(0, 1), (10, 11), (20, 45), (50, 51), (60, 99)] {
            let number = series.send(sent);
            series.arrive(number, arrived);
        }
        assert_eq!(series.silence_over(&(20..22)), Some(34));
        assert_eq!(series.silence_over(&(2..3)), Some(10));
        assert_eq!(series.silence_over(&(20..60)), Some(48));
        assert_eq!(series.silence_over(&(0..5)), None);
        assert_eq!(series.silence_over(&(98..120)), None);
    }

    #[test]
    fn late_replies_are_a_gap_and_no_outage() {
        let mut series = steady(1000, 500..530);
        (499..529).for_each(|sequence| series.arrive(sequence, 540 * MS));
        let summary = series.summary(0..1001 * MS, 3000 * MS);
        assert!(summary.gap_ms > 9.0 && summary.outage_ms == 0.0, "{summary:?}");
    }

    #[test]
    fn a_machine_that_went_silent_for_good_is_an_outage_up_to_the_end() {
        let summary = steady(3000, 1000..3001).summary(0..3001 * MS, 9000 * MS);
        assert!((summary.outage_ms - 2002.0).abs() < 1e-9, "{summary:?}");
    }

    #[test]
    fn replies_to_nothing_and_twice_are_counted() {
        let mut series = steady(10, 0..0);
        series.arrive(3, 8 * MS);
        series.arrive(99, 8 * MS);
        let summary = series.summary(0..20 * MS, 20 * MS);
        assert_eq!((summary.duplicates, summary.strangers), (1, 1));
    }
}
