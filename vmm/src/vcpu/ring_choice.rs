//! Whether the written pages of a machine are recorded by KVM's dirty log or by dirty rings. That has to be known before its
//! vCPUs are made.

use super::ring_probe::{self, Unfit};
use crate::config::{ConfigError, DirtyTracking, MachineConfig};
use crate::kvm::{Host, dirty_ring};

/// How a machine's written pages are recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracking {
    /// [`DirtyTracking::Log`] or [`DirtyTracking::Ring`].
    pub kind: DirtyTracking,
    /// Why it has no rings, if they were wanted.
    pub reason: Option<String>,
}

/// What decides whether rings can be had.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingRule {
    /// Whether this host's KVM can be trusted with them; asked only if it matters.
    pub(crate) fit: fn(&Host) -> Result<(), Unfit>,
    /// Most entries of a ring.
    pub(crate) most: u32,
}

impl Default for RingRule {
    fn default() -> Self {
        Self { fit: ring_probe::stops_in_time, most: u32::MAX }
    }
}

/// How the written pages of a machine with so many pages are recorded on this host, and how many entries each of its rings has.
///
/// # Errors
///
/// [`ConfigError::NoDirtyRing`] and [`ConfigError::UnfitDirtyRing`] if it must have rings and cannot.
pub(crate) fn choose(
    config: &MachineConfig,
    host: &Host,
    pages: u64,
    rule: RingRule,
) -> Result<(Option<u32>, Tracking), ConfigError> {
    decide(config, host.capabilities().dirty_ring.map(|(_, most)| most.min(rule.most)), pages, || (rule.fit)(host))
}

/// `most`: entries that KVM gives to a ring, if it has rings.
fn decide(
    config: &MachineConfig,
    most: Option<u32>,
    pages: u64,
    fit: impl FnOnce() -> Result<(), Unfit>,
) -> Result<(Option<u32>, Tracking), ConfigError> {
    let log = |reason| Ok((None, Tracking { kind: DirtyTracking::Log, reason }));
    let must = match config.dirty_tracking {
        DirtyTracking::Log => return log(None),
        // One vCPU that dirties is the one to hold: nobody has to find out which.
        DirtyTracking::Auto if config.vcpus == 1 => return log(None),
        DirtyTracking::Auto => false,
        DirtyTracking::Ring => true,
    };
    let Some(most) = most else {
        if must {
            return Err(ConfigError::NoDirtyRing);
        }
        return log(Some("this host's KVM has no dirty rings".into()));
    };
    match fit() {
        Err(unfit) if must => Err(ConfigError::UnfitDirtyRing(unfit.to_string())),
        Err(unfit) => {
            tracing::info!(reason = %unfit, "written pages are tracked by the dirty log, and not by rings");
            log(Some(unfit.to_string()))
        }
        Ok(()) => {
            let entries = dirty_ring::entries_for(pages, most);
            Ok((Some(entries), Tracking { kind: DirtyTracking::Ring, reason: None }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(tracking: &str, vcpus: u16) -> MachineConfig {
        let config = serde_json::json!({"name": "m", "memory_mib": 64, "vcpus": vcpus, "dirty_tracking": tracking});
        serde_json::from_value(config).unwrap()
    }

    fn fit() -> Result<(), Unfit> {
        Ok(())
    }

    fn unfit() -> Result<(), Unfit> {
        Err(Unfit::Late { used: 1020 })
    }

    fn unasked() -> Result<(), Unfit> {
        panic!("it takes time and does not matter")
    }

    #[test]
    fn the_log_unless_rings_are_wanted_and_can_be_trusted() {
        let log = |tracking, vcpus, most, fit: fn() -> Result<(), Unfit>| {
            let (entries, tracking) = decide(&config(tracking, vcpus), most, 1 << 14, fit).unwrap();
            assert_eq!((entries, tracking.kind), (None, DirtyTracking::Log));
            tracking.reason
        };
        assert_eq!(log("log", 8, Some(1 << 16), unasked), None);
        assert_eq!(log("auto", 1, Some(1 << 16), unasked), None);
        assert!(log("auto", 2, None, unasked).unwrap().contains("no dirty rings"));
        assert!(log("auto", 2, Some(1 << 16), unfit).unwrap().contains("1020 of 1024"));
        for (tracking, vcpus) in [("auto", 2), ("ring", 1)] {
            let (entries, tracking) = decide(&config(tracking, vcpus), Some(1 << 16), 1 << 14, fit).unwrap();
            assert_eq!((entries, tracking.kind, tracking.reason), (Some(1 << 14), DirtyTracking::Ring, None));
        }
    }

    #[test]
    fn rings_that_cannot_be_had_are_refused_in_words() {
        let refused =
            |most, fit: fn() -> Result<(), Unfit>| decide(&config("ring", 1), most, 4096, fit).unwrap_err().to_string();
        assert!(refused(None, unasked).contains("no dirty rings (Linux 5.11"));
        let text = refused(Some(4096), unfit);
        assert!(text.contains("too late") && text.ends_with("use \"auto\" or \"log\""), "{text}");
    }
}
