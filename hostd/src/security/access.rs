//! Access rules: who may do what with which machines and pools.
//!
//! Rules are read in order and the first that matches decides. Without a match: root, hostd's own user and members of
//! `socket_group` may do everything on the control socket; a declared peer may do what daemons need of each other
//! ([`PEER_DEFAULT`]) as long as no rule names hosts at all, and nothing beyond the rules once one does; everybody else may
//! do nothing.
//!
//! ```json
//! [{"who": {"host": "b*"}, "may": ["view", "receive"], "machines": ["web-*"]},
//!  {"who": {"uid": 1000}, "may": ["view"]},
//!  {"who": {"uid": 1001}, "may_not": ["delete"]}]
//! ```

use serde::{Deserialize, Serialize};

/// Something that needs permission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Read hosts, pools, machines, migrations, events, plans.
    View,
    /// Create a machine.
    Create,
    /// Delete a machine.
    Delete,
    /// Move a machine away from here.
    Migrate,
    /// Have a machine arrive here.
    Receive,
    /// Cancel a migration.
    Cancel,
    /// Ask for, or tell, the outcome of a migration.
    Settle,
    /// Declare and remove scheduled events.
    Event,
    /// Read the audit log.
    Audit,
}

impl Action {
    /// The word used in rules, messages and the audit log.
    pub fn word(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Create => "create",
            Self::Delete => "delete",
            Self::Migrate => "migrate",
            Self::Receive => "receive",
            Self::Cancel => "cancel",
            Self::Settle => "settle",
            Self::Event => "event",
            Self::Audit => "audit",
        }
    }
}

/// What a declared peer may do where no rule names hosts.
pub const PEER_DEFAULT: [Action; 5] = [Action::View, Action::Migrate, Action::Receive, Action::Cancel, Action::Settle];

/// Whom a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Who {
    /// A user of the control socket.
    Uid(u32),
    /// Hosts by name; `*` stands for any characters.
    Host(String),
    /// Hosts by their pool's name; `*` stands for any characters.
    Pool(String),
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessRule {
    /// Whom it is about.
    pub who: Who,
    /// Actions that it allows.
    #[serde(default)]
    pub may: Vec<Action>,
    /// Actions that it denies.
    #[serde(default)]
    pub may_not: Vec<Action>,
    /// Machines that it is about; `*` stands for any characters. An action without a machine matches any.
    #[serde(default = "anything")]
    pub machines: Vec<String>,
    /// Pools (of the other host, where a migration is concerned) that it is about.
    #[serde(default = "anything")]
    pub pools: Vec<String>,
}

fn anything() -> Vec<String> {
    vec!["*".to_owned()]
}

/// Whether a rule makes sense.
///
/// # Errors
///
/// What is wrong with it and what to do.
pub fn check_rule(rule: &AccessRule) -> Result<(), String> {
    if rule.may.is_empty() && rule.may_not.is_empty() {
        return Err("allows and denies nothing: list actions in `may` or `may_not`".to_owned());
    }
    if let Some(both) = rule.may.iter().find(|action| rule.may_not.contains(action)) {
        return Err(format!("`{}` stands in `may` and in `may_not`: keep one of them", both.word()));
    }
    if rule.machines.is_empty() || rule.pools.is_empty() {
        return Err("an empty list of machines or pools matches nothing: leave it out to match all".to_owned());
    }
    Ok(())
}
