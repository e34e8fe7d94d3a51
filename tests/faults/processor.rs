//! A destination whose processor lacks what the guest may use.

use tests::mounts;
use tests::world::{Spec, World};
use tests::{Need, ready};

use crate::refused;

/// A feature that every processor with KVM has, so that a host without it is a lesser one wherever this runs.
const FEATURE: &str = "cx16";

#[test]
fn a_lesser_processor_at_the_destination_refuses_and_names_the_feature() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    // The daemon of b1 reads of another processor; everything else about it is as it is.
    let lesser = world.host("b1").directory().join("cpuinfo");
    let mask = format!(
        "sed \"s/ {FEATURE} / /\" /proc/cpuinfo > {path}; mount --bind {path} /proc/cpuinfo",
        path = lesser.display()
    );
    mounts::restart(&world, "b1", &mask);
    refused(&world, &spec, &["processor of host `b1`", FEATURE, "choose a host with these features"]);
    mounts::restart_plain(&world, "b1");
    world.moves(&spec, "a1", "b1", None);
    world.finish();
}
