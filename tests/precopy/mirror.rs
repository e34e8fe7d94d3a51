//! A guest that writes to its disk faster than the link carries: its writes are mirrored, and it arrives.

use hostd::api::types::{MigrationLimits, MigrationStage};
use migration::policy::MigrationMode;
use tests::world::{Spec, World};
use tests::{Need, ready};

#[test]
fn a_disk_that_is_written_faster_than_the_link_moves_by_pre_copy() {
    if !ready(Need::Kvm) {
        return;
    }
    let mut spec = Spec::busy("vm1", 0);
    let workload = &mut spec.workload;
    (workload.sweep_mib, workload.sweep_mib_per_second, workload.fill_mib) = (1, 1, 0);
    (workload.disk_mib, workload.disk_mib_per_second) = (16, 64);
    let world = World::two_hosts();
    world.boot("a1", &spec);
    let fast = |status: &headroom_guest::Status| status.disk_mib_per_second >= 32;
    world.wait_guest(&spec, "to write to its disk", fast);
    let limits = MigrationLimits {
        bandwidth_bytes_per_second: Some(8 << 20),
        downtime_ms: 100,
        mode: MigrationMode::Precopy,
        ..MigrationLimits::default()
    };
    let ended = world.migrate("vm1", "a1", "b1", Some(limits));
    assert_eq!(ended.stage, MigrationStage::Completed, "{:?}\n{}", ended.error, world.logs());
    let report = ended.report.expect("a report");
    println!("{:?}, {:.0} ms, down {:.1} ms", report.disk, report.total_ms, report.downtime_ms.total);
    assert!(report.disk.mirrored > 0, "{:?}", report.disk);
    assert_eq!(report.verification.disk_digest_ok, Some(true));
    // Nothing holds its writes any more.
    world.wait_guest(&spec, "to write to its disk as before", fast);
    world.check_oracles(&spec);
    world.finish();
}
