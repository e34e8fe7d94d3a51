//! The audit log: every action, every denial, every outcome; append-only, each record chained to the one before.

use tracing::{error, info, warn};

use super::access::{Action, Actor, Verdict};
use crate::api::types::Decision;
use crate::store::Store;

/// Writes to the audit log of one host.
#[derive(Clone, Debug)]
pub struct Audit {
    store: Store,
}

impl Audit {
    /// A log in `store`.
    pub fn new(store: Store) -> Self {
        Self { store }
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
