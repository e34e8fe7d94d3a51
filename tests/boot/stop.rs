//! Machines are stopped, get and lose disks, and start again.

use headroom_guest::Settings;
use hostd::api::types::{KernelChoice, Machine, MachineStatus, MigrateRequest, MigrationStage, NewDisk, StopMachine};
use tests::world::{Spec, World};
use tests::{Need, mounts, ready};

const FORCE: StopMachine = StopMachine { timeout_s: 60, force: true };

fn stop(world: &World, how: &StopMachine) -> Result<Machine, String> {
    let stopped = world.ask("a1", async |client| client.stop_machine("vm1", how).await);
    stopped.map_err(|error| format!("{:?} {error}", error.status()))
}

fn attach(world: &World, disk: &NewDisk) -> Result<Machine, String> {
    let attached = world.ask("a1", async |client| client.attach_disk("vm1", disk).await);
    attached.map_err(|error| format!("{:?} {error}", error.status()))
}

fn sized(id: &str, mib: u64) -> NewDisk {
    NewDisk { id: id.into(), size_mib: Some(mib), path: None, read_only: false, shared: false }
}

fn show(world: &World) -> Machine {
    world.ask("a1", async |client| client.machine("vm1").await).unwrap()
}

/// Starts it; how much of its first disk the guest uses then, in MiB.
fn start(world: &World, spec: &Spec) -> u32 {
    world.ask("a1", async |client| client.start_machine("vm1").await).unwrap();
    world.wait_guest(spec, "to be ready", |status| status.ready);
    world.check_oracles(spec);
    world.set(spec, Settings { disk_mib: Some(64), ..Settings::default() }).workload.disk_mib
}

#[test]
fn a_machine_stops_when_it_is_asked_and_comes_back_with_its_disks() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let mut spec = Spec { disk_mib: 8, ..Spec::busy("vm1", 0) };
    spec.workload.disk_mib = 8;
    let made = world.boot("a1", &spec);
    world.check_oracles(&spec);
    let refused = attach(&world, &sized("disk1", 16)).unwrap_err();
    assert!(refused.starts_with("Some(409)") && refused.contains("machine stop"), "{refused}");
    assert!(stop(&world, &StopMachine { timeout_s: 0, force: false }).unwrap_err().starts_with("Some(400)"));

    let stopped = stop(&world, &StopMachine::default()).unwrap();
    assert_eq!((stopped.status, stopped.pid), (MachineStatus::Stopped, None));
    assert!(stopped.reason.is_some_and(|reason| reason.contains("reset")));
    let console = std::fs::read_to_string(&made.console).unwrap();
    assert!(console.contains("headroom-guest power off"), "its guest did not do it: {console}");
    let image = made.disks[0].path.clone();
    let content = std::fs::read(&image).unwrap();
    assert!(content.iter().any(|byte| *byte != 0), "the guest has written");
    assert_eq!(stop(&world, &StopMachine::default()).unwrap().status, MachineStatus::Stopped, "it stays so");

    mounts::restart_plain(&world, "a1");
    assert_eq!(show(&world).status, MachineStatus::Stopped, "the next daemon knows it");
    assert!(std::fs::read(&image).unwrap() == content, "its disk is as the guest left it");
    assert_eq!(start(&world, &spec), 8);

    // By force, and the disk is exchanged for a new one, and back.
    let stopped = stop(&world, &FORCE).unwrap();
    assert_eq!((stopped.status, stopped.pid), (MachineStatus::Stopped, None));
    assert!(stopped.reason.is_some_and(|reason| reason.contains("by force")));
    let content = std::fs::read(&image).unwrap();
    let attached = attach(&world, &sized("disk1", 16)).unwrap();
    assert!(attached.disks[1].owned && attached.disks[1].bytes == 16 << 20, "{attached:?}");
    world.ask("a1", async |client| client.detach_disk("vm1", "disk0").await).unwrap();
    assert_eq!(start(&world, &spec), 16, "the guest sees the new disk");
    assert!(std::fs::read(&image).unwrap() == content, "nobody has the old one");

    stop(&world, &StopMachine::default()).unwrap();
    let old = NewDisk { path: Some(image.clone()), size_mib: None, ..sized("disk0", 0) };
    for (disk, expected) in [
        (NewDisk { id: "disk1".into(), ..old.clone() }, "Some(400) disk id `disk1` is there twice"),
        (sized("disk0", 8), "Some(422) disk `disk0`: cannot make"),
        (NewDisk { path: Some("/nonexistent".into()), ..old.clone() }, "Some(422) disk `disk0`: cannot open"),
        (NewDisk { shared: true, ..old.clone() }, "Some(422) disk `disk0` is not shared with this host"),
        (sized("disk2", 1 << 24), "Some(507) no room"),
    ] {
        let refused = attach(&world, &disk).unwrap_err();
        assert!(refused.starts_with(expected), "`{expected}`: {refused}");
    }
    assert_eq!(show(&world).disks.len(), 1, "nothing of what was refused");
    attach(&world, &old).unwrap();
    mounts::restart_plain(&world, "a1");
    world.ask("a1", async |client| client.detach_disk("vm1", "disk1").await).unwrap();
    assert!(std::fs::read(&image).unwrap() == content, "it is as it was");
    assert_eq!(start(&world, &spec), 8, "the guest sees the old disk");
    world.ask("a1", async |client| client.delete_machine("vm1").await).unwrap();
    assert!(image.exists() && attached.disks[1].path.exists(), "what was detached is the operator's");
    std::fs::remove_dir_all(image.parent().unwrap()).unwrap();
    world.finish();
}

#[test]
fn a_machine_on_its_way_is_not_stopped() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    // Held back before its switchover it is on its way for as long as we look at it.
    let request =
        MigrateRequest { destination: "b1".into(), pause_before_switchover: true, ..MigrateRequest::default() };
    let started = world.ask("a1", async |client| client.migrate("vm1", &request).await).unwrap();
    for how in [StopMachine::default(), FORCE] {
        let refused = stop(&world, &how).unwrap_err();
        assert!(refused.starts_with("Some(409)") && refused.contains("cancel it"), "{refused}");
    }
    // Not behind the daemon's back either.
    let vmm = vmm::api::client::Client::new(show(&world).api_socket);
    world.wait("its VMM to know of the migration", || vmm.migration().ok().flatten());
    let refused = vmm.ask_to_shut_down().unwrap_err();
    assert_eq!(refused.status(), Some(409), "{refused}");
    world.ask("a1", async |client| client.cancel_migration(&started.id).await).unwrap();
    assert_eq!(world.wait_migration("a1", &started.id).stage, MigrationStage::Cancelled);
    world.check_oracles(&spec);
    world.wait("the machine to be stopped", || stop(&world, &StopMachine::default()).ok());
    world.finish();
}

/// A kernel that switches its keyboard on and stands still: a PVH note, and where it points a few bytes of machine code.
fn indifferent() -> Vec<u8> {
    const ADDRESS: u64 = 0x20_0000;
    // mov al, 0x60; out 0x64, al; mov al, 0x41; out 0x60, al; hlt; jmp back to it
    const CODE: [u8; 11] = [0xb0, 0x60, 0xe6, 0x64, 0xb0, 0x41, 0xe6, 0x60, 0xf4, 0xeb, 0xfd];
    let mut elf = vec![0; 64 + 2 * 56 + 20];
    let end = elf.len() as u64;
    let mut put = |offset: usize, value: &[u8]| elf[offset..offset + value.len()].copy_from_slice(value);
    put(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 62, 0, 1]);
    put(24, &ADDRESS.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &[56, 0, 2, 0]);
    // What is loaded: from its offset, to its address, so many bytes.
    put(64, &1u32.to_le_bytes());
    for (field, value) in [(8, end), (24, ADDRESS), (32, CODE.len() as u64), (40, CODE.len() as u64)] {
        put(64 + field, &value.to_le_bytes());
    }
    put(120, &4u32.to_le_bytes());
    put(120 + 8, &176u64.to_le_bytes());
    put(120 + 32, &20u64.to_le_bytes());
    put(176, b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0");
    put(192, &(ADDRESS as u32).to_le_bytes());
    elf.extend_from_slice(&CODE);
    elf
}

#[test]
fn a_guest_that_does_not_shut_down_runs_on() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    std::fs::write(&kernel, indifferent()).unwrap();
    let mut request = Spec::busy("vm1", 0).request();
    (request.kernel, request.probes) = (KernelChoice::Path(kernel), Vec::new());
    world.ask("a1", async |client| client.create_machine(&request).await).unwrap();
    let short = StopMachine { timeout_s: 1, force: false };
    let refused = world.wait("its keyboard to be on", || {
        Some(stop(&world, &short).unwrap_err()).filter(|refused| !refused.contains("does not listen"))
    });
    assert!(refused.starts_with("Some(409)") && refused.contains("still runs after 1 s"), "{refused}");
    assert_eq!(show(&world).status, MachineStatus::Running);
    assert_eq!(stop(&world, &FORCE).unwrap().status, MachineStatus::Stopped);
    world.finish();
}
