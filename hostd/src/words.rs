//! What a migration report says, in words that the command line and the demo share.

use migration::report::{Downtime, Rates, Verification};

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

/// What the guest did before and after, if both are known.
pub(crate) fn rates(rates: &Rates) -> Option<String> {
    let (before, after) = (rates.before?, rates.after?);
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    Some(format!(
        "processor {:.2} -> {:.2} cores, disk {:.1} -> {:.1} MiB/s, network {:.1} -> {:.1} MiB/s",
        before.vcpu_cores,
        after.vcpu_cores,
        mib(before.disk_bytes_per_second),
        mib(after.disk_bytes_per_second),
        mib(before.network_bytes_per_second),
        mib(after.network_bytes_per_second)
    ))
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
