//! Names of common CPU features, as Linux shows them in `/proc/cpuinfo`.

/// Names by bit, separated by spaces; `-` where there is none.
type Names = (u32, u32, &'static str, &'static str);

const NAMES: [Names; 10] = [
    (
        1,
        0,
        "ECX",
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    (
        1,
        0,
        "EDX",
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    (
        7,
        0,
        "EBX",
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    (
        7,
        0,
        "ECX",
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    (
        7,
        0,
        "EDX",
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds md_clear - - tsx_force_abort serialize - tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities ssbd",
    ),
    (
        7,
        1,
        "EAX",
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd - - fzrm fsrs fsrc - - - - - - wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam",
    ),
    (0xd, 1, "EAX", "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        0x8000_0001,
        0,
        "ECX",
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    (
        0x8000_0001,
        0,
        "EDX",
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    (
        0x8000_0008,
        0,
        "EBX",
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs stibp - stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no",
    ),
];

/// The name of a feature bit, if it is a common one.
pub fn name(leaf: u32, index: u32, register: &str, bit: u32) -> Option<&'static str> {
    let (.., names) = NAMES.iter().find(|names| (names.0, names.1, names.2) == (leaf, index, register))?;
    names.split(' ').nth(bit as usize).filter(|&name| name != "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_at_their_bits() {
        for (leaf, register, bit, expected) in [
            (1, "ECX", 23, "popcnt"),
            (1, "ECX", 31, "hypervisor"),
            (1, "EDX", 26, "sse2"),
            (7, "EBX", 31, "avx512vl"),
            (7, "ECX", 16, "la57"),
            (7, "EDX", 29, "arch_capabilities"),
            (0x8000_0001, "ECX", 23, "perfctr_core"),
            (0x8000_0001, "EDX", 29, "lm"),
            (0x8000_0008, "EBX", 12, "ibpb"),
            (0x8000_0008, "EBX", 24, "amd_ssbd"),
        ] {
            assert_eq!(name(leaf, 0, register, bit), Some(expected));
        }
        assert_eq!(name(1, 0, "ECX", 16), None);
        assert_eq!(name(0xdead, 0, "EAX", 0), None);
    }
}
