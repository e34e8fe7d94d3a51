//! When a chosen move starts.
//!
//! Not before it has to: a forecast may not come true, and a machine that need not move is better left alone. Not later than
//! its latest safe start either: the moment until which contention is improbable (`early_risk`), less what the move takes (90 %)
//! and a reserve (`lead_s`). Where the forecast is so uncertain that contention may be near at any time, that moment is now.

use predictor::Move;

use super::Planner;
use crate::api::types::{Plan, PlanOutcome};
use crate::clock::unix_ms;

impl Planner {
    /// Whether `best` still has time; notes why, and until when, in the plan.
    pub(super) fn waits(&self, stored: &mut Plan, best: &Move, now_s: f64) -> bool {
        let planner = &self.config.planner;
        let (in_s, risk) = (best.latest_start_s - now_s, 100.0 * planner.early_risk);
        stored.latest_start_unix_ms = Some(unix_ms() + (in_s.max(0.0) * 1000.0) as u64);
        // The next decision is one step away.
        let waits = in_s > self.step_s();
        stored.reasons.push(if waits {
            format!(
                "waits for its latest safe start, in {in_s:.0} s: a move that is over {:.0} s before contention is \
                 at most {risk:.0} % probable is early enough, and the forecast may change until then",
                planner.lead_s
            )
        } else {
            format!(
                "starts now: contention is more than {risk:.0} % probable after {:.0} s, the move takes up to {:.1} s \
                 (90 %) and is to be over {:.0} s before",
                best.contention_at_s - now_s,
                best.cost.total_ms_p90 / 1000.0,
                planner.lead_s
            )
        });
        waits
    }

    /// Remembers a move that waits; returns it to be stored if it is another one than before.
    pub(super) fn keep_waiting(&mut self, mut stored: Plan) -> Option<Plan> {
        stored.outcome = PlanOutcome::Waiting;
        let Some(before) = &mut self.waiting else {
            self.waiting = Some(stored.clone());
            return Some(stored);
        };
        stored.id.clone_from(&before.id);
        let same = before.machine == stored.machine && before.destination == stored.destination;
        *before = stored;
        (!same).then(|| before.clone())
    }

    /// The plan that waits, if any, is given up.
    pub(super) fn drop_waiting(&mut self, why: &str) -> Option<Plan> {
        let mut dropped = self.waiting.take()?;
        dropped.outcome = PlanOutcome::Dropped;
        dropped.reasons.push(format!("dropped: {why}"));
        Some(dropped)
    }

    /// As [`Planner::drop_waiting`], once the score has fallen.
    pub(super) fn drop_if_calm(&mut self) -> Option<Plan> {
        let own = &self.config.pool;
        let score = self.contentions.get(own).filter(|contention| super::known(contention))?.score;
        self.drop_waiting(&format!(
            "the score fell to {score:.2} before the latest safe start, so that nothing had to be moved"
        ))
    }
}
