//! What the processor can do, to refuse a migration to a lesser one before anything is moved. The engine compares what the
//! guest was really shown (CPUID leaves) once more in its handshake.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Vendor and feature flags, in the words of `/proc/cpuinfo`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFeatures {
    /// For example `GenuineIntel`.
    pub vendor: String,
    /// For example `avx2`.
    pub flags: BTreeSet<String>,
}

/// Flags that guests do not see or that say nothing about what code can run: a difference in them is no obstacle.
const HOST_ONLY: &[&str] = &[
    "acpi",
    "aperfmperf",
    "arat",
    "art",
    "bts",
    "cat_l2",
    "cat_l3",
    "cdp_l3",
    "constant_tsc",
    "cqm",
    "cqm_llc",
    "cqm_mbm_local",
    "cqm_mbm_total",
    "cqm_occup_llc",
    "dtes64",
    "dtherm",
    "dts",
    "epb",
    "ept",
    "ept_ad",
    "est",
    "flexpriority",
    "hwp",
    "hwp_act_window",
    "hwp_epp",
    "hwp_pkg_req",
    "ida",
    "intel_pt",
    "mba",
    "monitor",
    "nonstop_tsc",
    "npt",
    "pbe",
    "pdcm",
    "pebs",
    "pln",
    "pts",
    "rdt_a",
    "smx",
    "svm",
    "tm",
    "tm2",
    "tpr_shadow",
    "vmx",
    "vnmi",
    "vpid",
    "xtpr",
    "cpuid",
    "rep_good",
    "nopl",
    "tsc_known_freq",
    "arch_perfmon",
    "extd_apicid",
    "aperfmperf",
    "cpuid_fault",
];

impl CpuFeatures {
    /// Those of this host.
    pub fn of_this_host() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
    }

    fn parse(cpuinfo: &str) -> Self {
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
            line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim()).unwrap_or_default()
        };
        let flags = field("flags").split_whitespace().filter(|flag| !HOST_ONLY.contains(flag)).map(str::to_owned);
        Self { vendor: field("vendor_id").to_owned(), flags: flags.collect() }
    }

    /// What a machine of `source` may use and this processor lacks; empty if it can run here.
    pub fn missing_for(&self, source: &Self) -> Vec<String> {
        if self.vendor != source.vendor {
            return vec![format!("vendor {} (this is {})", source.vendor, self.vendor)];
        }
        source.flags.difference(&self.flags).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(vendor: &str, flags: &str) -> CpuFeatures {
        CpuFeatures::parse(&format!("processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\nprocessor : 1\n"))
    }

    #[test]
    fn a_lesser_processor_is_named_and_a_better_one_is_not() {
        let old = cpu("GenuineIntel", "fpu sse2 vmx");
        let new = cpu("GenuineIntel", "fpu sse2 avx512f hwp");
        assert!(new.missing_for(&old).is_empty(), "vmx is not shown to guests");
        assert_eq!(old.missing_for(&new), ["avx512f"]);
        assert!(cpu("AuthenticAMD", "fpu").missing_for(&old)[0].contains("GenuineIntel"));
        let here = CpuFeatures::of_this_host();
        assert!(here.missing_for(&here).is_empty());
    }
}
