//! What a request is about, for the rules of access and for the audit log.

use crate::security::access::Object;

/// `kind:name`, harmless in a log whatever the name is.
pub(super) fn object(kind: &str, name: &str) -> String {
    let name: String = name.chars().take(80).collect();
    format!("{kind}:{}", name.escape_debug())
}

/// A machine, for the rules.
pub(super) fn about(machine: &str) -> Object<'_> {
    Object { machine: Some(machine), pool: None }
}
