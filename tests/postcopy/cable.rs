//! The cable is pulled in the middle of post-copy.

use hostd::api::types::MigrationStage;
use migration::policy::MigrationMode;
use tests::world::World;
use tests::{Need, ready};

use super::{in_postcopy, limits, storm};

#[test]
fn a_pulled_cable_holds_the_machine_up_and_loses_nothing() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = storm("vm1");
    world.boot("a1", &spec);
    let started = world.start_migration("vm1", "a1", "b1", limits(MigrationMode::Postcopy, 8)).unwrap();
    in_postcopy(&world, &started.id);
    world.lab.fabric().set_link("b1", false).unwrap();
    let note = world.wait("words at the source", || {
        let migration = world.ask("a1", async |client| client.migration(&started.id).await).ok()?;
        migration.progress?.error
    });
    assert!(note.contains("reconnecting"), "{note}");
    world.lab.fabric().set_link("b1", true).unwrap();
    let ended = world.wait_migration("a1", &started.id);
    assert_eq!(ended.stage, MigrationStage::Completed, "{:?}\n{}", ended.error, world.logs());
    let report = ended.report.expect("a report at the source");
    println!("{}", serde_json::to_string_pretty(&report).unwrap());
    assert!(report.postcopy.as_ref().is_some_and(|postcopy| postcopy.recoveries >= 1), "{report:?}");
    let equal = (report.verification.memory_digest_ok, report.verification.disk_digest_ok);
    assert_eq!(equal, (Some(true), Some(true)));
    assert_eq!(world.machines_on("b1"), ["vm1"]);
    world.check_oracles(&spec);
    world.finish();
}
