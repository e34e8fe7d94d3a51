//! When to act: hysteresis against a score that trembles about the threshold, cooldown against acting again before the last
//! action has shown its effect.

use serde::{Deserialize, Serialize};

/// How a [`Trigger`] behaves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TriggerConfig {
    /// Acts when the score has been at least this.
    pub act_above: f64,
    /// Once it has acted on a rise, the score has to fall below this before it counts as a new rise.
    pub rearm_below: f64,
    /// For how many steps in a row the score has to be high.
    pub confirm_steps: u32,
    /// Seconds after an action in which it does not act again.
    pub cooldown_s: f64,
    /// The cooldown grows by this factor with each action in the same rise of the score.
    pub backoff: f64,
    /// The longest cooldown in seconds.
    pub longest_cooldown_s: f64,
}

impl Default for TriggerConfig {
    fn default() -> Self {
        Self {
            act_above: 0.5,
            rearm_below: 0.25,
            confirm_steps: 2,
            cooldown_s: 300.0,
            backoff: 2.0,
            longest_cooldown_s: 6.0 * 3600.0,
        }
    }
}

/// Why nothing is done.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reason")]
pub enum Hold {
    /// The score is low.
    Calm,
    /// The score is high, but not for long enough.
    Confirming {
        /// Steps still to come.
        steps_left: u32,
    },
    /// The last action was too recent.
    Cooldown {
        /// Until it ends.
        seconds_left: f64,
    },
    /// The score is no number.
    NoScore,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "decision")]
pub enum Decision {
    /// Nothing.
    Hold {
        /// Why.
        why: Hold,
    },
    /// Look for a machine to move. It stays at that until [`Trigger::acted`] is called or the score falls.
    Act {
        /// The score that it is about.
        score: f64,
        /// How many actions there were in this rise of the score already.
        earlier_actions: u32,
    },
}

/// Watches the score of one pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trigger {
    config: TriggerConfig,
    high_steps: u32,
    raised: bool,
    actions: u32,
    acted_at_s: Option<f64>,
    /// How it stood before the last action: actions, and when.
    #[serde(default)]
    before: Option<(u32, Option<f64>)>,
}

impl Trigger {
    /// A trigger that has seen nothing.
    #[must_use]
    pub fn new(config: TriggerConfig) -> Self {
        Self { config, high_steps: 0, raised: false, actions: 0, acted_at_s: None, before: None }
    }

    /// Takes the score of this step; `now_s` is the caller's clock in seconds.
    pub fn step(&mut self, score: f64, now_s: f64) -> Decision {
        if score.is_nan() {
            return Decision::Hold { why: Hold::NoScore };
        }
        // A clock that was set back must not make a cooldown of years.
        self.acted_at_s = self.acted_at_s.map(|acted| acted.min(now_s));
        if score < self.config.rearm_below {
            self.raised = false;
            if self.cooldown_left(now_s) <= 0.0 {
                self.actions = 0;
            }
        }
        if score >= self.config.act_above {
            self.high_steps = self.high_steps.saturating_add(1);
        } else if !self.raised || score < self.config.rearm_below {
            // Between the two thresholds a confirmed rise stays confirmed, and an unconfirmed one starts anew.
            self.high_steps = 0;
        }
        if self.high_steps == 0 {
            return Decision::Hold { why: Hold::Calm };
        }
        if self.high_steps < self.config.confirm_steps {
            return Decision::Hold {
                why: Hold::Confirming { steps_left: self.config.confirm_steps - self.high_steps },
            };
        }
        self.raised = true;
        let seconds_left = self.cooldown_left(now_s);
        if seconds_left > 0.0 {
            return Decision::Hold { why: Hold::Cooldown { seconds_left } };
        }
        Decision::Act { score, earlier_actions: self.actions }
    }

    /// Notes that an action was started: the cooldown begins.
    pub fn acted(&mut self, now_s: f64) {
        self.before = Some((self.actions, self.acted_at_s));
        self.actions = self.actions.saturating_add(1);
        self.acted_at_s = Some(now_s);
    }

    /// Takes the last action back: it was refused, nothing has moved, and there is no effect to wait for.
    pub fn retract(&mut self) {
        if let Some((actions, acted_at_s)) = self.before.take() {
            (self.actions, self.acted_at_s) = (actions, acted_at_s);
        }
    }

    /// Seconds until the cooldown ends; 0 if there is none.
    #[must_use]
    pub fn cooldown_left(&self, now_s: f64) -> f64 {
        let Some(acted) = self.acted_at_s else { return 0.0 };
        let growth = self.config.backoff.max(1.0).powi(self.actions.saturating_sub(1).min(64) as i32);
        let cooldown = (self.config.cooldown_s * growth).min(self.config.longest_cooldown_s);
        (acted + cooldown - now_s).max(0.0)
    }

    /// Whether the score is in a rise that was confirmed and has not ended.
    #[must_use]
    pub fn raised(&self) -> bool {
        self.raised
    }

    /// How it was set up.
    #[must_use]
    pub fn config(&self) -> &TriggerConfig {
        &self.config
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn trigger() -> Trigger {
        Trigger::new(TriggerConfig { cooldown_s: 60.0, longest_cooldown_s: 600.0, ..TriggerConfig::default() })
    }

    fn acts(decision: Decision) -> bool {
        matches!(decision, Decision::Act { .. })
    }

    #[test]
    fn one_spike_is_not_enough() {
        let mut trigger = trigger();
        for t in 0..100 {
            let score = if t % 2 == 0 { 0.9 } else { 0.2 };
            assert!(!acts(trigger.step(score, f64::from(t))));
        }
        assert_eq!(trigger.step(0.9, 100.0), Decision::Hold { why: Hold::Confirming { steps_left: 1 } });
        assert!(acts(trigger.step(0.9, 101.0)));
    }

    #[test]
    fn a_score_that_trembles_about_the_threshold_stays_one_rise() {
        let mut trigger = trigger();
        trigger.step(0.6, 0.0);
        assert!(acts(trigger.step(0.6, 1.0)));
        assert!(acts(trigger.step(0.4, 2.0)), "between the thresholds the rise goes on");
        assert_eq!(trigger.step(0.2, 3.0), Decision::Hold { why: Hold::Calm });
        assert_eq!(trigger.step(0.4, 4.0), Decision::Hold { why: Hold::Calm }, "and does not start there");
    }

    #[test]
    fn cooldown_grows_in_one_rise_and_is_forgiven_after_calm() {
        let mut trigger = trigger();
        let mut at = Vec::new();
        for t in 0..1_000 {
            if acts(trigger.step(0.9, f64::from(t))) {
                trigger.acted(f64::from(t));
                at.push(t);
            }
        }
        assert_eq!(at, [1, 61, 181, 421, 901], "60, 120, 240, 480 s apart");
        assert!(matches!(trigger.step(0.9, 1_000.0), Decision::Hold { why: Hold::Cooldown { .. } }));
        trigger.step(0.1, 2_000.0);
        trigger.step(0.9, 2_001.0);
        assert!(acts(trigger.step(0.9, 2_002.0)));
        trigger.acted(2_002.0);
        assert!((trigger.cooldown_left(2_002.0) - 60.0).abs() < 1e-9, "back at the first cooldown");
    }

    #[test]
    fn an_action_that_was_refused_starts_no_cooldown() {
        let mut trigger = trigger();
        trigger.acted(0.0);
        assert!((trigger.cooldown_left(10.0) - 50.0).abs() < 1e-9);
        trigger.acted(70.0);
        trigger.retract();
        assert_eq!(trigger.cooldown_left(71.0), 0.0, "that of the one before is over");
        trigger.retract();
        assert!((trigger.cooldown_left(10.0) - 50.0).abs() < 1e-9, "only the last one is taken back");
    }

    #[test]
    fn a_clock_that_goes_back_and_no_score_are_survived() {
        let mut trigger = trigger();
        trigger.acted(1e9);
        assert_eq!(trigger.step(f64::NAN, 0.0), Decision::Hold { why: Hold::NoScore });
        trigger.step(0.9, 0.0);
        trigger.step(0.9, 1.0);
        assert!(acts(trigger.step(0.9, 61.0)));
    }

    proptest! {
        #[test]
        fn never_two_actions_within_the_cooldown(scores in proptest::collection::vec(0.0_f64..1.0, 1..400)) {
            let mut trigger = trigger();
            let mut last: Option<usize> = None;
            for (t, score) in scores.iter().enumerate() {
                if acts(trigger.step(*score, t as f64)) {
                    prop_assert!(last.is_none_or(|last| t - last >= 60));
                    prop_assert!(*score >= 0.25);
                    trigger.acted(t as f64);
                    last = Some(t);
                }
            }
        }
    }
}
