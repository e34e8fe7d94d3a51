//! The bundled guest under `hostd`: devices, services and oracles.

use std::time::Duration;

use headroom_guest::Settings;
use hostd::api::types::MachineStatus;
use hostd::lab::interrupt;
use tests::world::{DEADLINE, Spec, World, assert_clean};
use tests::{Need, ping, ready};

#[test]
fn it_answers_writes_to_its_disk_and_finds_what_it_wrote() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    let machine = world.boot("a1", &spec);
    assert_eq!(machine.status, MachineStatus::Running);
    // The daemon answered as soon as the vCPUs were told to run; it learns of their first entry with the next sample.
    let first = || world.ask("a1", async |client| client.machine("vm1").await).unwrap().first_instruction_us;
    assert!(world.wait("the first instruction", first) > 0);
    world.lab.observer().run(|| ping::wait(spec.address(), DEADLINE)).unwrap().unwrap();

    let status = world.check_oracles(&spec);
    assert!(status.disk_flushes > 0 && status.heartbeat > 0, "{status:?}");
    // The image on the host holds what the guest wrote.
    let image = std::fs::read(&machine.disks[0].path).unwrap();
    assert_eq!(image.len() as u64, spec.disk_mib << 20);
    assert!(image[..4096].iter().any(|byte| *byte != 0), "the guest has written, and the image is empty");

    let observer = world.observe(&[&spec], 200, 50);
    let start = observer.now();
    interrupt::poll("100 echoes", DEADLINE, Duration::from_millis(20), || {
        let udp = observer.udp("vm1", start..u64::MAX);
        Ok(udp.filter(|udp| udp.answered >= 100))
    })
    .unwrap();
    assert!(observer.tcp("vm1").unwrap().alive());
    drop(observer);
    world.finish();
}

#[test]
fn what_it_does_can_be_changed_while_it_runs() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    world.set(&spec, Settings { cpu_percent: Some(40), sweep_mib_per_second: Some(0), ..Settings::default() });
    let before = world.status(&spec);
    let status = world.wait_guest(&spec, "to work more and to stop sweeping", |status| {
        status.cpu_percent >= 25 && status.sweep_mib_per_second == 0 && status.work_units > before.work_units
    });
    assert_clean(&status);
    // hostd measures it too.
    world.wait("the load to be seen by hostd", || {
        let machine = world.ask("a1", async |client| client.machine("vm1").await).ok()?;
        machine.usage.filter(|usage| usage.cpu_cores > 0.2 && usage.memory_mib > 10.0)
    });
    world.finish();
}
