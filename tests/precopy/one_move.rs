//! One move, looked at from all sides.

use hostd::api::types::{DirtyRateRequest, DirtyRateSource, MigrationLimits};
use migration::report::{Mode, Outcome};
use tests::world::{Spec, World, last_echoes};
use tests::{Need, ready};

#[test]
fn a_busy_machine_moves_with_its_memory_disk_and_connections() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    world.check_oracles(&spec);
    let asked = DirtyRateRequest { interval_ms: 500 };
    let rate = world.ask("a1", async |client| client.dirty_rate("vm1", &asked).await).expect("an estimate");
    assert!(rate.source == DirtyRateSource::Sampled && rate.bytes_per_second > Some(0.0), "{rate:?}");
    let observer = world.observe(&[&spec], 1000, 100);
    let start = observer.now();
    world.wait("a measurement of the machine under this load", || {
        let machine = world.ask("a1", async |client| client.machine("vm1").await).ok()?;
        machine.usage.filter(|usage| usage.network_bytes_per_second > 10_000.0)
    });
    let report = world.moves(&spec, "a1", "b1", None);
    println!("{}", serde_json::to_string_pretty(&report).unwrap());
    assert_eq!((report.outcome, report.mode), (Outcome::Completed, Mode::Precopy));
    assert_eq!(world.machines_on("a1"), Vec::<String>::new());
    assert_eq!(world.machines_on("b1"), ["vm1"]);

    let verification = &report.verification;
    assert_eq!((verification.memory_digest_ok, verification.disk_digest_ok), (Some(true), Some(true)));
    assert!(verification.pages_checked > 0 && verification.blocks_checked > 0, "{verification:?}");
    assert!(verification.probes.len() == 2 && verification.probes.iter().all(|probe| probe.ok), "{verification:?}");
    assert_eq!(report.tls.version, "TLSv1_3");
    // The guest does at the destination what it did before: it works, writes its disk and answers the observer.
    let (before, after) = verification.rates.before.zip(verification.rates.after).expect("both were measured");
    for (before, after) in [
        (before.vcpu_cores, after.vcpu_cores),
        (before.disk_bytes_per_second, after.disk_bytes_per_second),
        (before.network_bytes_per_second, after.network_bytes_per_second),
    ] {
        assert!(before > 0.0 && after > before / 10.0, "{:?}", verification.rates);
    }

    // What an outside client saw.
    let udp = last_echoes(&observer, "vm1", start);
    println!("network gap {:.1} ms, downtime {:.1} ms, {udp:?}", udp.gap_ms, report.downtime_ms.total);
    assert!(udp.answered > 100, "{udp:?}");
    let parts = &report.downtime_ms;
    let sum = parts.pause + parts.final_pages + parts.final_blocks + parts.state + parts.commit + parts.resume;
    assert!(
        (sum - parts.total).abs() < 1.0 + parts.total * 0.1,
        "the parts of the downtime are not the whole: {parts:?}"
    );
    // No promise about a busy computer; but a gap far from the downtime is an error in one of them.
    assert!(udp.gap_ms < report.downtime_ms.total + 100.0, "gap {:.1} ms, reported {parts:?}", udp.gap_ms);
    drop(observer);
    world.finish();
}

#[test]
fn both_stopped_images_are_compared_in_full_where_that_is_asked() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    let limits = MigrationLimits { compare_full: true, ..MigrationLimits::default() };
    let report = world.moves(&spec, "a1", "b1", Some(limits));
    // The comparison is made before Commit: had it failed, the machine would not be here.
    assert_eq!(report.outcome, Outcome::Completed);
    assert_eq!(report.verification.memory_digest_ok, Some(true));
    world.finish();
}

/// Memory comes and goes in the guest all the way there and back; what is free leaves the host, and does not travel.
#[test]
fn a_machine_with_a_balloon_moves_without_what_it_does_not_use() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let mut spec = Spec { balloon: true, ..Spec::busy("vm1", 0) };
    (spec.workload.churn_mib, spec.workload.churn_mib_per_second) = (24, 48);
    world.boot("a1", &spec);
    let balloon = |host: &str| {
        assert!(world.ask(host, async |client| client.machine("vm1").await).expect("the machine").balloon);
        world.ask(host, async |client| client.balloon("vm1").await).expect("a balloon")
    };
    world.wait("memory to be given back", || (balloon("a1").reported_bytes > 24 << 20).then_some(()));
    for (from, to) in [("a1", "b1"), ("b1", "a1")] {
        let report = world.moves(&spec, from, to, None);
        assert_eq!(report.verification.memory_digest_ok, Some(true), "{report:?}");
        let status = world.check_oracles(&spec);
        assert_eq!(status.churn_errors, 0, "{status:?}");
        let before = balloon(to).reported_bytes;
        world.wait("memory to be given back again", || (balloon(to).reported_bytes > before).then_some(()));
    }
    // What an operator asks for is given, and stays given wherever the machine goes; then it gets all of it back.
    let ask = |host: &str, mib| world.ask(host, async |client| client.inflate("vm1", mib).await).expect("it is asked");
    assert_eq!(ask("a1", 8).target_bytes, 8 << 20);
    world.wait("the balloon", || (balloon("a1").actual_bytes == 8 << 20).then_some(()));
    world.moves(&spec, "a1", "b1", None);
    assert_eq!((balloon("b1").target_bytes, balloon("b1").actual_bytes), (8 << 20, 8 << 20));
    ask("b1", 0);
    world.wait("an empty balloon", || (balloon("b1").actual_bytes == 0).then_some(()));
    assert_eq!(world.check_oracles(&spec).churn_errors, 0);
    let refused =
        world.ask("b1", async |client| client.inflate("vm1", 1 << 20).await).expect_err("too much").to_string();
    assert!(refused.contains("balloon"), "{refused}");
    world.finish();
}
