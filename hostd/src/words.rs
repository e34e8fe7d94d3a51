//! What a migration report says, in words that the command line and the demo share.

use migration::report::{Downtime, Verification};

/// What the downtime is made of, part by part.
pub(crate) fn downtime_parts(downtime: &Downtime) -> [String; 6] {
    [
        ("pause", downtime.pause),
        ("pages", downtime.final_pages),
        ("blocks", downtime.final_blocks),
        ("state", downtime.state),
        ("commit", downtime.commit),
        ("resume", downtime.resume),
    ]
    .map(|(part, ms)| format!("{part} {ms:.1}"))
}

/// What the comparison of memory and disk found.
pub(crate) fn digests(verification: &Verification) -> String {
    let found = |equal: Option<bool>| match equal {
        Some(true) => "equal",
        Some(false) => "DIFFERENT",
        None => "not compared",
    };
    format!(
        "memory {} ({} pages), disk {} ({} blocks)",
        found(verification.memory_digest_ok),
        verification.pages_checked,
        found(verification.disk_digest_ok),
        verification.blocks_checked
    )
}
