//! The audit log.

use serde::{Deserialize, Serialize};

/// Whether an action was allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Allowed, and about to be done.
    Allowed,
    /// Denied; nothing was done.
    Denied,
    /// Done by hostd itself, or the outcome of an allowed action.
    Noted,
}

/// One record of `GET /v1/audit`. Records are only ever appended, and each carries the hash of the one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// 1, 2, 3, ... without gaps.
    pub sequence: u64,
    /// When.
    pub at_unix_ms: u64,
    /// `uid:0`, `host:a2` or `hostd`.
    pub actor: String,
    /// For example `create`, `migrate`, `receive`.
    pub action: String,
    /// For example `machine:vm3`.
    pub object: String,
    /// Whether it was allowed.
    pub decision: Decision,
    /// Rule, cause or outcome.
    pub detail: String,
    /// SHA-256 of the record before, hexadecimal; 64 zeroes for the first.
    pub previous: String,
    /// SHA-256 over all fields above.
    pub hash: String,
}
