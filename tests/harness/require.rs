//! What a test needs of the machine that it runs on.

use std::path::Path;

/// Something that not every machine offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Namespaces, bridges and control groups.
    Root,
    /// `/dev/kvm`, and root as well.
    Kvm,
}

/// Whether the test can run. If not, it says why on standard error and returns false: the test then ends successfully.
///
/// # Panics
/// With `HEADROOM_REQUIRE_KVM=1` a missing need fails the test: in CI nothing is skipped in silence.
#[must_use]
pub fn ready(need: Need) -> bool {
    let Some(missing) = missing(need) else { return true };
    let required = std::env::var_os("HEADROOM_REQUIRE_KVM").is_some_and(|value| value == "1");
    assert!(!required, "HEADROOM_REQUIRE_KVM=1, but {missing}");
    eprintln!("skipped: {missing}");
    false
}

fn missing(need: Need) -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("this test makes network namespaces and must run as root");
    }
    if need == Need::Kvm && !Path::new("/dev/kvm").exists() {
        return Some("this test runs machines and /dev/kvm is missing");
    }
    None
}
