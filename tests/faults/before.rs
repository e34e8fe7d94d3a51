//! Refusals before anything has moved.

use hostd::api::types::{MigrationStage, NewDisk};
use hostd::lab::{HostSpec, LabError, binary};
use tests::world::{Spec, World};
use tests::{Need, ready};

use crate::refused;

#[test]
fn a_destination_without_room_refuses_and_says_what_is_short() {
    if !ready(Need::Kvm) {
        return;
    }
    let hosts = [HostSpec::new("a1", "a"), HostSpec::new("b1", "b").with_memory_mib(100.0)];
    let world = World::new(&hosts, |_| ());
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    refused(&world, &spec, &["no room on host `b1`", "memory needs 128 MiB", "100 of 100 MiB"]);
    world.finish();
}

#[test]
fn a_destination_that_cannot_make_the_disk_refuses_and_a_retry_works() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    // Where the folder of the disks ought to be is a file: root, too, cannot write there.
    let folder = world.host("b1").directory().join("state/machines");
    let aside = folder.with_extension("aside");
    let existed = std::fs::rename(&folder, &aside).is_ok();
    std::fs::write(&folder, "not a folder").unwrap();
    refused(&world, &spec, &["state/machines"]);
    std::fs::remove_file(&folder).unwrap();
    if existed {
        std::fs::rename(&aside, &folder).unwrap();
    }
    world.moves(&spec, "a1", "b1", None);
    world.finish();
}

#[test]
fn a_missing_disk_is_refused_with_its_path() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let mut request = Spec::busy("vm1", 0).request();
    request.disks = vec![NewDisk {
        id: "disk0".into(),
        size_mib: None,
        path: Some("/nowhere/disk.raw".into()),
        read_only: false,
        shared: false,
    }];
    let error = world.ask("a1", async |client| client.create_machine(&request).await).unwrap_err();
    assert!(error.to_string().contains("/nowhere/disk.raw"), "{error}");
    assert_eq!(world.machines_on("a1"), Vec::<String>::new());
    world.finish();
}

#[test]
fn a_destination_that_is_not_a_peer_or_does_not_answer_is_named() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    let error = world.start_migration("vm1", "a1", "c7", None).unwrap_err();
    assert!(error.to_string().contains("c7"), "{error}");
    world.host("b1").kill_daemon();
    let error = match world.start_migration("vm1", "a1", "b1", None) {
        Err(error) => error.to_string(),
        Ok(migration) => world.wait_migration("a1", &migration.id).error.expect("why it failed"),
    };
    assert!(error.contains("b1"), "{error}");
    world.check_oracles(&spec);
    // It comes back, and the move works.
    world.host("b1").spawn_daemon(&binary("hostd").unwrap()).unwrap();
    world.host("b1").wait_ready().unwrap();
    let migration = world.wait("b1 to be a peer again", || {
        let started = world.start_migration("vm1", "a1", "b1", None).ok()?;
        let ended = world.wait_migration("a1", &started.id);
        (ended.stage == MigrationStage::Completed).then_some(ended)
    });
    assert_eq!(migration.destination, "b1");
    world.check_oracles(&spec);
    world.finish();
}

#[test]
fn a_daemon_whose_port_is_taken_says_so_and_ends() {
    if !ready(Need::Root) {
        return;
    }
    let lab = hostd::lab::Lab::new(&[HostSpec::new("a1", "a")]).unwrap();
    let host = lab.host("a1").unwrap();
    let address = (host.address(), hostd::lab::host::PEER_PORT);
    let _taken = host.namespace().run(|| std::net::TcpListener::bind(address)).unwrap().unwrap();
    let config = host.default_config(Vec::new(), binary("headroom-vmm").unwrap());
    host.write_config(&config).unwrap();
    host.spawn_daemon(&binary("hostd").unwrap()).unwrap();
    let Err(LabError::Daemon { log, what, .. }) = host.wait_ready() else { panic!("it started on a taken port") };
    assert!(what.contains("ended"), "{what}");
    assert!(log.contains("10.77.0.1:7420"), "{log}");
    lab.remove().unwrap();
}

#[test]
fn a_malformed_configuration_ends_the_daemon_with_every_mistake() {
    if !ready(Need::Root) {
        return;
    }
    let lab = hostd::lab::Lab::new(&[HostSpec::new("a1", "a")]).unwrap();
    let host = lab.host("a1").unwrap();
    let mut config = host.default_config(Vec::new(), binary("headroom-vmm").unwrap());
    config.sample_interval_ms = 1;
    config.host = "not a name!".into();
    host.write_config(&config).unwrap();
    host.spawn_daemon(&binary("hostd").unwrap()).unwrap();
    let Err(LabError::Daemon { log, .. }) = host.wait_ready() else { panic!("it started with a wrong configuration") };
    assert!(log.contains("sample_interval_ms") && log.contains("host"), "{log}");
    std::fs::write(host.config_path(), "{\"host\": ").unwrap();
    host.spawn_daemon(&binary("hostd").unwrap()).unwrap();
    let Err(LabError::Daemon { log, .. }) = host.wait_ready() else { panic!("it started with half a configuration") };
    assert!(log.contains("hostd.json"), "{log}");
    lab.remove().unwrap();
}
