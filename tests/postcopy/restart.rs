//! Daemons that are restarted in the middle of post-copy: the VMMs go on, and the daemons take their part up again.

use hostd::api::types::MigrationStage;
use hostd::lab::binary;
use migration::policy::MigrationMode;
use tests::world::World;
use tests::{Need, ready};

use super::{in_postcopy, limits, storm};

fn restarted_in_the_middle(hosts: &[&str]) {
    let world = World::two_hosts();
    let spec = storm("vm1");
    world.boot("a1", &spec);
    let started = world.start_migration("vm1", "a1", "b1", limits(MigrationMode::Postcopy, 8)).unwrap();
    in_postcopy(&world, &started.id);
    for host in hosts {
        world.host(host).kill_daemon();
        world.host(host).spawn_daemon(&binary("hostd").unwrap()).unwrap();
        world.host(host).wait_ready().unwrap();
    }
    for host in ["a1", "b1"] {
        let ended = world.wait_migration(host, &started.id);
        assert_eq!(ended.stage, MigrationStage::Completed, "{host}: {:?}\n{}", ended.error, world.logs());
        if let Some(report) = ended.report {
            let equal = (report.verification.memory_digest_ok, report.verification.disk_digest_ok);
            assert_eq!(equal, (Some(true), Some(true)));
            assert!(report.verification.probes.iter().all(|probe| probe.ok), "{report:?}");
        }
    }
    assert_eq!((world.machines_on("a1"), world.machines_on("b1")), (vec![], vec!["vm1".to_owned()]));
    world.check_oracles(&spec);
    world.finish();
}

#[test]
fn the_daemon_of_the_source() {
    if ready(Need::Kvm) {
        restarted_in_the_middle(&["a1"]);
    }
}

#[test]
fn the_daemon_of_the_destination() {
    if ready(Need::Kvm) {
        restarted_in_the_middle(&["b1"]);
    }
}
