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
    /// Stop a machine, and change what it has.
    Adjust,
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
    /// Drain this host and open it again, and change its bandwidth for migrations.
    Host,
}

impl Action {
    /// The word used in rules, messages and the audit log.
    pub fn word(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Create => "create",
            Self::Delete => "delete",
            Self::Adjust => "adjust",
            Self::Migrate => "migrate",
            Self::Receive => "receive",
            Self::Cancel => "cancel",
            Self::Settle => "settle",
            Self::Event => "event",
            Self::Audit => "audit",
            Self::Host => "host",
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

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Actor {
    /// A user of the control socket.
    User {
        /// User id of the process at the other end.
        uid: u32,
        /// It belongs to `socket_group`, is root, or runs as the same user as hostd.
        operator: bool,
    },
    /// A declared peer, by its certificate.
    Peer {
        /// Its name.
        host: String,
        /// Its pool, by this host's configuration.
        pool: String,
    },
    /// This daemon's planner.
    Planner,
}

impl std::fmt::Display for Actor {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::User { uid, .. } => write!(formatter, "uid:{uid}"),
            Self::Peer { host, .. } => write!(formatter, "host:{host}"),
            Self::Planner => formatter.write_str("planner"),
        }
    }
}

/// What an action is about.
#[derive(Clone, Copy, Debug, Default)]
pub struct Object<'a> {
    /// Machine, if it is about one.
    pub machine: Option<&'a str>,
    /// Pool of the other host, if another host is concerned.
    pub pool: Option<&'a str>,
}

/// The outcome of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it may be done.
    pub allowed: bool,
    /// The rule that decided, for people.
    pub rule: String,
}

/// The rules of one host.
#[derive(Clone, Debug, Default)]
pub struct Access {
    rules: Vec<AccessRule>,
}

impl Access {
    /// Rules in the order in which they are tried.
    pub fn new(rules: Vec<AccessRule>) -> Self {
        Self { rules }
    }

    /// Whether `actor` may do `action`.
    pub fn decide(&self, actor: &Actor, action: Action, object: Object<'_>) -> Verdict {
        for (index, rule) in self.rules.iter().enumerate() {
            if !matches_actor(&rule.who, actor) || !matches_object(rule, object) {
                continue;
            }
            if rule.may_not.contains(&action) {
                return Verdict { allowed: false, rule: format!("access[{index}]") };
            }
            if rule.may.contains(&action) {
                return Verdict { allowed: true, rule: format!("access[{index}]") };
            }
        }
        self.default_for(actor, action)
    }

    fn default_for(&self, actor: &Actor, action: Action) -> Verdict {
        let (allowed, rule) = match actor {
            Actor::Planner => (true, "the planner of this host"),
            Actor::User { operator, .. } => (*operator, "default: root and the members of socket_group"),
            Actor::Peer { .. } if self.rules.iter().any(|rule| !matches!(rule.who, Who::Uid(_))) => {
                (false, "default: rules name hosts, and none of them allows this")
            }
            Actor::Peer { .. } => (PEER_DEFAULT.contains(&action), "default: declared peers"),
        };
        Verdict { allowed, rule: rule.to_owned() }
    }
}

fn matches_actor(who: &Who, actor: &Actor) -> bool {
    match (who, actor) {
        (Who::Uid(rule), Actor::User { uid, .. }) => rule == uid,
        (Who::Host(pattern), Actor::Peer { host, .. }) => glob(pattern, host),
        (Who::Pool(pattern), Actor::Peer { pool, .. }) => glob(pattern, pool),
        _ => false,
    }
}

fn matches_object(rule: &AccessRule, object: Object<'_>) -> bool {
    let any = |patterns: &[String], name: Option<&str>| {
        name.is_none_or(|name| patterns.iter().any(|pattern| glob(pattern, name)))
    };
    any(&rule.machines, object.machine) && any(&rule.pools, object.pool)
}

/// Whether `name` matches `pattern`, in which `*` stands for any characters; linear but for the last star, which is retried.
pub fn glob(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        if p < pattern.len() && pattern[p] == b'*' {
            star = Some((p, n));
            p += 1;
        } else if p < pattern.len() && pattern[p] == name[n] {
            p += 1;
            n += 1;
        } else if let Some((star_p, star_n)) = star {
            p = star_p + 1;
            n = star_n + 1;
            star = Some((star_p, n));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(host: &str, pool: &str) -> Actor {
        Actor::Peer { host: host.into(), pool: pool.into() }
    }

    fn machine(name: &str) -> Object<'_> {
        Object { machine: Some(name), pool: None }
    }

    fn rules(json: &str) -> Access {
        let rules: Vec<AccessRule> = serde_json::from_str(json).unwrap();
        assert!(rules.iter().all(|rule| check_rule(rule).is_ok()));
        Access::new(rules)
    }

    #[test]
    fn stars_match_any_characters() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("web-*", "web-1", true),
            ("web-*", "db-1", false),
            ("*b*c", "aabbcc", true),
            ("*b*c", "aabbcd", false),
            ("a", "ab", false),
            ("", "", true),
            ("**", "x", true),
        ] {
            assert_eq!(glob(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn without_rules_operators_may_all_peers_may_migrate_and_others_nothing() {
        let access = Access::default();
        let root = Actor::User { uid: 0, operator: true };
        let other = Actor::User { uid: 1000, operator: false };
        for action in [Action::View, Action::Create, Action::Delete, Action::Audit] {
            assert!(access.decide(&root, action, Object::default()).allowed);
            assert!(!access.decide(&other, action, Object::default()).allowed);
        }
        assert!(access.decide(&peer("b1", "b"), Action::Receive, machine("vm1")).allowed);
        assert!(!access.decide(&peer("b1", "b"), Action::Delete, machine("vm1")).allowed);
    }

    #[test]
    fn the_first_matching_rule_decides_and_rules_for_hosts_end_the_default() {
        let access = rules(
            r#"[{"who":{"host":"b1"},"may_not":["receive"],"machines":["db-*"]},
                {"who":{"pool":"b"},"may":["receive","view"]},
                {"who":{"uid":1000},"may":["view"]},
                {"who":{"uid":0},"may_not":["delete"]}]"#,
        );
        assert!(!access.decide(&peer("b1", "b"), Action::Receive, machine("db-1")).allowed);
        assert!(access.decide(&peer("b1", "b"), Action::Receive, machine("web-1")).allowed);
        assert!(!access.decide(&peer("c1", "c"), Action::View, Object::default()).allowed);
        assert!(access.decide(&Actor::User { uid: 1000, operator: false }, Action::View, Object::default()).allowed);
        let denied = access.decide(&Actor::User { uid: 0, operator: true }, Action::Delete, machine("vm1"));
        assert_eq!(denied, Verdict { allowed: false, rule: "access[3]".into() });
    }

    #[test]
    fn rules_that_say_nothing_or_both_are_mistakes() {
        let rule: AccessRule = serde_json::from_str(r#"{"who":{"uid":1}}"#).unwrap();
        assert!(check_rule(&rule).unwrap_err().contains("list actions"));
        let rule: AccessRule = serde_json::from_str(r#"{"who":{"uid":1},"may":["view"],"may_not":["view"]}"#).unwrap();
        assert!(check_rule(&rule).unwrap_err().contains("keep one"));
    }
}
