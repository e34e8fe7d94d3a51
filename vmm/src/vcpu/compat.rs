//! Can this host's processor stand in for the one that a guest knows?
//!
//! A guest decides once, at its start, what its processor can do. Every feature bit that it was shown must therefore exist
//! here; more may exist, and stays hidden from it. Numbers that describe (sizes of caches, model, topology) may differ.

use migration::guest::CpuProfile;

use super::feature_names;

/// The guest's processor cannot be offered here.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Incompatible {
    /// Another make.
    #[error(
        "the guest runs on a {wanted:?} processor, this host has {here:?}: choose a destination with processors of the same make"
    )]
    Vendor {
        /// What the guest knows.
        wanted: String,
        /// What is here.
        here: String,
    },
    /// Features are missing.
    #[error(
        "this host lacks CPU features that the guest was started with: {}: choose a destination with the same or a newer processor and kernel, or start the machine on the older host",
        list(.0)
    )]
    Features(Vec<Missing>),
    /// A leaf that this build does not know, so that nobody can tell what its bits mean.
    #[error(
        "the guest was shown CPUID leaf {leaf:#x} (index {index}), which this host's version does not know: update headroom-vmm on this host"
    )]
    UnknownLeaf {
        /// Function.
        leaf: u32,
        /// Index.
        index: u32,
    },
    /// The TSC.
    #[error(
        "the guest's TSC runs at {wanted} kHz, this host's at {here} kHz and cannot be scaled: choose a destination with the same TSC frequency, or with TSC scaling"
    )]
    Tsc {
        /// What the guest knows.
        wanted: u32,
        /// What is here.
        here: u32,
    },
}

/// One feature bit that is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Function.
    pub leaf: u32,
    /// Index.
    pub index: u32,
    /// Register.
    pub register: &'static str,
    /// Bit number.
    pub bit: u32,
}

impl std::fmt::Display for Missing {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = feature_names::name(self.leaf, self.index, self.register, self.bit).unwrap_or("unknown feature");
        write!(formatter, "{name} (CPUID {:#x}.{} {} bit {})", self.leaf, self.index, self.register, self.bit)
    }
}

fn list(missing: &[Missing]) -> String {
    const SHOWN: usize = 12;
    let mut text = missing.iter().take(SHOWN).map(Missing::to_string).collect::<Vec<_>>().join(", ");
    if missing.len() > SHOWN {
        text += &format!(" and {} more", missing.len() - SHOWN);
    }
    text
}

/// Registers as columns of a leaf.
const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

/// Words made of feature bits: leaf, index, and the bits of EAX, EBX, ECX and EDX that count. Bits that mirror run-time
/// state (OSXSAVE, OSPKE) and topology (HTT) do not.
const FEATURE_WORDS: [(u32, u32, [u32; 4]); 16] = [
    (0x1, 0, [0, 0, !(1 << 27), !(1 << 28)]),
    (0x6, 0, [1 << 2, 0, 0, 0]),
    (0x7, 0, [0, !0, !(1 << 4), !0]),
    (0x7, 1, [!0, !0, !0, !0]),
    (0x7, 2, [0, 0, 0, !0]),
    (0xd, 0, [!0, 0, 0, !0]),
    (0xd, 1, [!0, 0, !0, !0]),
    (0x19, 0, [!0, !0, !0, 0]),
    (0x1e, 1, [!0, 0, 0, 0]),
    (0x24, 0, [0, 0xffff_0000, 0, 0]),
    (0x4000_0001, 0, [!0, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !(1 << 1), !0]),
    (0x8000_0007, 0, [0, !0, 0, !0]),
    (0x8000_0008, 0, [0, !0, 0, 0]),
    (0x8000_0021, 0, [!0, 0, !0, 0]),
    (0xc000_0001, 0, [0, 0, 0, !0]),
];

/// The highest leaves of each range whose meaning this build knows.
const KNOWN_LEAVES: [(u32, u32); 4] =
    [(0, 0x24), (0x4000_0000, 0x4000_0010), (0x8000_0000, 0x8000_0026), (0xc000_0000, 0xc000_0004)];

/// Checks that a host which offers `offer` can show `wanted` to a guest.
///
/// # Errors
///
/// [`Incompatible`] names what is missing and what to do.
pub fn check(wanted: &CpuProfile, offer: &CpuProfile, tsc_scaling: bool) -> Result<(), Incompatible> {
    let (vendor, here) = (vendor(wanted), vendor(offer));
    if vendor != here {
        return Err(Incompatible::Vendor { wanted: vendor, here });
    }
    for &[leaf, index, eax, ebx, ecx, edx] in &wanted.leaves {
        let known = KNOWN_LEAVES.iter().any(|&(first, last)| (first..=last).contains(&leaf));
        if !known && eax | ebx | ecx | edx != 0 {
            return Err(Incompatible::UnknownLeaf { leaf, index });
        }
    }
    let missing: Vec<Missing> = FEATURE_WORDS.into_iter().flat_map(|word| missing_bits(word, wanted, offer)).collect();
    if !missing.is_empty() {
        return Err(Incompatible::Features(missing));
    }
    if !tsc_scaling && !same_frequency(wanted.tsc_khz, offer.tsc_khz) {
        return Err(Incompatible::Tsc { wanted: wanted.tsc_khz, here: offer.tsc_khz });
    }
    Ok(())
}

/// Hosts measure their frequency at boot: KVM itself takes up to 250 ppm for the same (`tsc_tolerance_ppm`).
fn same_frequency(a: u32, b: u32) -> bool {
    u64::from(a.abs_diff(b)) * 1_000_000 <= u64::from(a.max(b)) * 250
}

fn registers(profile: &CpuProfile, leaf: u32, index: u32) -> [u32; 4] {
    let found = profile.leaves.iter().find(|entry| (entry[0], entry[1]) == (leaf, index));
    found.map_or([0; 4], |&[_, _, eax, ebx, ecx, edx]| [eax, ebx, ecx, edx])
}

fn missing_bits((leaf, index, masks): (u32, u32, [u32; 4]), wanted: &CpuProfile, offer: &CpuProfile) -> Vec<Missing> {
    let (wanted, offer) = (registers(wanted, leaf, index), registers(offer, leaf, index));
    let mut missing = Vec::new();
    for (column, register) in REGISTERS.into_iter().enumerate() {
        let bits = wanted[column] & !offer[column] & masks[column];
        missing.extend((0..32).filter(|bit| bits >> bit & 1 == 1).map(|bit| Missing { leaf, index, register, bit }));
    }
    missing
}

fn vendor(profile: &CpuProfile) -> String {
    let [_, ebx, ecx, edx] = registers(profile, 0, 0);
    let bytes: Vec<u8> = [ebx, edx, ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> CpuProfile {
        CpuProfile {
            leaves: vec![
                [0, 0, 0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
                [1, 0, 0x00a1_0f11, 0x800, 0x8120_2000, 0x178b_fbff],
                [7, 0, 0, 1 << 5, 0, 0],
            ],
            tsc_khz: 2_100_000,
        }
    }

    #[test]
    fn a_host_that_offers_more_is_fine() {
        let mut offer = profile();
        offer.leaves[2][3] |= 1 << 16;
        offer.tsc_khz += 500;
        assert_eq!(check(&profile(), &offer, false), Ok(()));
    }

    #[test]
    fn a_missing_feature_is_named() {
        let mut wanted = profile();
        wanted.leaves[2][3] |= 1 << 16 | 1 << 31;
        wanted.leaves.push([0x8000_0001, 0, 0, 0, 1 << 6, 0]);
        let error = check(&wanted, &profile(), false).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("avx512f (CPUID 0x7.0 EBX bit 16)"), "{text}");
        assert!(text.contains("sse4a (CPUID 0x80000001.0 ECX bit 6)"), "{text}");
        assert!(text.contains("choose a destination"), "{text}");
    }

    #[test]
    fn run_time_bits_do_not_matter() {
        let mut wanted = profile();
        wanted.leaves[1][4] |= 1 << 27;
        assert_eq!(check(&wanted, &profile(), false), Ok(()));
    }

    #[test]
    fn other_makes_unknown_leaves_and_clocks_are_refused() {
        let mut wanted = profile();
        wanted.leaves[0][3] = 0x756e_6547;
        assert!(matches!(check(&wanted, &profile(), false), Err(Incompatible::Vendor { .. })));
        let mut wanted = profile();
        wanted.leaves.push([0x8000_0077, 1, 1, 0, 0, 0]);
        assert_eq!(check(&wanted, &profile(), false), Err(Incompatible::UnknownLeaf { leaf: 0x8000_0077, index: 1 }));
        let mut wanted = profile();
        wanted.tsc_khz = 2_600_000;
        assert!(matches!(check(&wanted, &profile(), false), Err(Incompatible::Tsc { here: 2_100_000, .. })));
        assert_eq!(check(&wanted, &profile(), true), Ok(()));
    }
}
