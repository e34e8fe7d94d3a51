//! A host is emptied.

use std::process::{Child, Command, Output, Stdio};

use hostd::api::types::{DrainState, DrainStep, Drained, MachineStatus, MigrationLimits};
use hostd::lab::{HostSpec, binary};
use migration::report::TriggerKind;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::world::{Spec, World};
use tests::{Need, ready};

/// `headroom host ...` on `a1`.
fn headroom(world: &World, arguments: &[&str]) -> Child {
    let mut command = Command::new(binary("headroom").unwrap());
    command.arg("--socket").arg(world.host("a1").socket()).arg("host").args(arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn ended(child: Child) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    (status.code(), format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr)))
}

fn drained(world: &World, name: &str) -> Drained {
    let drain = world.ask("a1", async |client| client.drain().await).unwrap();
    drain.machines.into_iter().find(|machine| machine.machine == name).expect("the machine")
}

fn restart(world: &World) {
    world.host("a1").kill_daemon();
    world.host("a1").spawn_daemon(&binary("hostd").unwrap()).unwrap();
    world.host("a1").wait_ready().unwrap();
}

#[test]
fn every_machine_that_can_go_goes_where_there_is_room() {
    if !ready(Need::Kvm) {
        return;
    }
    // The other host of the pool has room for one.
    let hosts = [HostSpec::new("a1", "a"), HostSpec::new("a2", "a").with_memory_mib(200.0), HostSpec::new("b1", "b")];
    let world = World::new(&hosts, |_| ());
    let specs = [Spec::busy("vm1", 0), Spec::busy("vm2", 1), Spec::busy("vm3", 2)];
    for spec in &specs {
        world.boot("a1", spec);
    }
    let pid = world.ask("a1", async |client| client.machine("vm3").await).unwrap().pid.unwrap();
    // Its number was read from the daemon that waits for it, so it cannot belong to another process.
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    world.wait("a stopped machine", || {
        let machine = world.ask("a1", async |client| client.machine("vm3").await).unwrap();
        (machine.status == MachineStatus::Stopped).then_some(())
    });
    world.wait("peers that answer", || {
        let host = world.ask("a1", async |client| client.host().await).unwrap();
        host.peers.iter().all(|peer| peer.live).then_some(())
    });
    let (code, text) = ended(headroom(&world, &["drain"]));
    assert_eq!(code, Some(4), "one machine cannot go: {text}\n{}", world.logs());
    assert!(text.contains("vm3") && text.contains("it is stopped"), "{text}");
    let there = [drained(&world, "vm1"), drained(&world, "vm2")];
    let mut destinations: Vec<String> = there.iter().filter_map(|machine| machine.destination.clone()).collect();
    destinations.sort();
    assert_eq!(destinations, ["a2", "b1"], "{there:?}");
    let migration = there[0].migration.clone().unwrap();
    let migration = world.ask("a1", async |client| client.migration(&migration).await).unwrap();
    assert_eq!(migration.trigger.kind, TriggerKind::Drain);
    for spec in &specs[..2] {
        world.check_oracles(spec);
    }

    restart(&world);
    let drain = world.wait("the drain, which goes on", || {
        let drain = world.ask("a1", async |client| client.drain().await).unwrap();
        (drain.state == DrainState::Blocked).then_some(drain)
    });
    assert_eq!(drain.machines.iter().filter(|machine| machine.step == DrainStep::Moved).count(), 2, "{drain:?}");
    let refused =
        world.ask("a1", async |client| client.create_machine(&Spec::busy("vm9", 9).request()).await).unwrap_err();
    assert!(refused.to_string().contains("being drained"), "{refused}");
    let (from, to) = (drained(&world, "vm2").destination.unwrap(), "a1");
    let back = world.migrate("vm2", &from, to, None);
    assert!(back.error.as_ref().is_some_and(|error| error.contains("being drained")), "{back:?}");
    world.ask("a1", async |client| client.delete_machine("vm3").await).unwrap();
    world.wait("an empty host", || {
        let drain = world.ask("a1", async |client| client.drain().await).unwrap();
        (drain.state == DrainState::Empty).then_some(())
    });
    let (code, text) = ended(headroom(&world, &["undrain"]));
    assert_eq!(code, Some(0), "{text}");
    let back = world.migrate("vm2", &from, to, None);
    assert!(back.error.is_none(), "{back:?}");
    world.check_oracles(&specs[1]);
    world.finish();
}

#[test]
fn a_ctrl_c_finishes_what_is_under_way_and_starts_nothing_more() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::new(&[HostSpec::new("a1", "a"), HostSpec::new("b1", "b")], |config| {
        config.concurrent_migrations = 1;
    });
    let specs = [Spec::busy("vm1", 0), Spec::busy("vm2", 1)];
    for spec in &specs {
        let mut request = spec.request();
        // A few seconds for each.
        request.limits = MigrationLimits { bandwidth_bytes_per_second: Some(16 << 20), ..MigrationLimits::default() };
        world.ask("a1", async |client| client.create_machine(&request).await).unwrap();
        world.wait_guest(spec, "to be ready", |status| status.ready);
    }
    world.wait("a peer that answers", || {
        let host = world.ask("a1", async |client| client.host().await).unwrap();
        host.peers.iter().all(|peer| peer.live).then_some(())
    });
    let child = headroom(&world, &["drain", "--to", "b1"]);
    world.wait("the first move", || {
        let drain = world.ask("a1", async |client| client.drain().await).unwrap();
        drain.machines.iter().any(|machine| machine.step == DrainStep::Moving).then_some(())
    });
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    let (code, text) = ended(child);
    assert_eq!(code, Some(130), "{text}");
    assert!(text.contains("no further machine is moved"), "{text}");
    world.wait("the end of the first move", || (world.machines_on("a1").len() == 1).then_some(()));
    restart(&world);
    let drain = world.ask("a1", async |client| client.drain().await).unwrap();
    assert_eq!(drain.state, DrainState::Paused, "{drain:?}");
    let migrations = world.ask("a1", async |client| client.migrations().await).unwrap();
    assert_eq!(migrations.len(), 1, "nothing more was started: {migrations:?}");
    world.wait("a peer that answers again", || {
        let host = world.ask("a1", async |client| client.host().await).unwrap();
        host.peers.iter().all(|peer| peer.live).then_some(())
    });
    let (code, text) = ended(headroom(&world, &["drain"]));
    assert_eq!(code, Some(0), "{text}\n{}", world.logs());
    assert!(text.contains("the host is empty"), "{text}");
    assert_eq!(world.machines_on("b1").len(), 2);
    for spec in &specs {
        world.check_oracles(spec);
    }
    world.finish();
}
