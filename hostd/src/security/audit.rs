//! The audit log: every action, every denial, every outcome; append-only, each record chained to the one before.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::access::{Action, Actor, Verdict};
use crate::api::types::Decision;
use crate::store::Store;

/// Refused connections that are recorded in one [`REFUSED_SPAN`]; anybody can cause them, and nobody may fill the disk so.
const REFUSED_MAX: u32 = 60;

/// See [`REFUSED_MAX`].
const REFUSED_SPAN: Duration = Duration::from_secs(60);

/// Writes to the audit log of one host.
#[derive(Clone, Debug)]
pub struct Audit {
    store: Store,
    refused: Arc<Mutex<Refused>>,
}

/// Refused connections in the present span.
#[derive(Debug, Default)]
struct Refused {
    since: Option<Instant>,
    count: u32,
}

impl Refused {
    /// Counts one; whether it is to be recorded, and how many were not in the span that has just ended.
    fn count(&mut self, now: Instant) -> (bool, u32) {
        let mut left_out = 0;
        if self.since.is_none_or(|since| now.duration_since(since) >= REFUSED_SPAN) {
            left_out = self.count.saturating_sub(REFUSED_MAX);
            *self = Self { since: Some(now), count: 0 };
        }
        self.count = self.count.saturating_add(1);
        (self.count <= REFUSED_MAX, left_out)
    }
}

impl Audit {
    /// A log in `store`.
    pub fn new(store: Store) -> Self {
        Self { store, refused: Arc::default() }
    }

    /// Records a decision on access. Reading is recorded only where it was denied: it happens several times a second.
    pub fn decided(&self, actor: &Actor, action: Action, object: &str, verdict: &Verdict) {
        if !verdict.allowed {
            warn!(%actor, action = action.word(), object, rule = verdict.rule, "denied");
            self.append(&actor.to_string(), action.word(), object, Decision::Denied, &verdict.rule);
        } else if !matches!(action, Action::View | Action::Audit) {
            self.append(&actor.to_string(), action.word(), object, Decision::Allowed, &verdict.rule);
        }
    }

    /// Records what hostd did by itself, or the outcome of an action.
    pub fn noted(&self, action: &str, object: &str, detail: &str) {
        info!(action, object, detail, "noted");
        self.append("hostd", action, object, Decision::Noted, detail);
    }

    /// Records a connection that was refused before it said anything.
    pub fn refused(&self, from: &str, detail: &str) {
        let (record, left_out) = self.refused.lock().unwrap_or_else(PoisonError::into_inner).count(Instant::now());
        if left_out > 0 {
            self.noted("connect", "peer-api", &format!("{left_out} further connections were refused and not recorded"));
        }
        if !record {
            return;
        }
        warn!(from, detail, "connection refused");
        self.append(from, "connect", "peer-api", Decision::Denied, detail);
    }

    fn append(&self, actor: &str, action: &str, object: &str, decision: Decision, detail: &str) {
        if let Err(failure) = self.store.append_audit(actor, action, object, decision, detail) {
            // The action goes on: a full disk must not keep a machine from being saved from its host.
            error!(
                actor,
                action,
                object,
                error = &failure as &dyn std::error::Error,
                "the audit log cannot be written"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_refused_connections_does_not_fill_the_log() {
        let mut refused = Refused::default();
        let start = Instant::now();
        let recorded = (0..1000).filter(|_| refused.count(start).0).count();
        assert_eq!(recorded, 60);
        assert_eq!(refused.count(start + REFUSED_SPAN), (true, 940), "and says how many there were");
    }
}
