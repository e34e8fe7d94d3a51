//! A machine that does not answer its probe after the move.

use hostd::api::types::{MachineStatus, MigrateRequest, MigrationStage, OnFailedProbe, ProbeSpec};
use migration::report::TriggerKind;
use tests::world::{Spec, World};
use tests::{Need, ready};

#[test]
fn it_raises_an_alarm_and_goes_back_once_where_that_was_wanted() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    let mut request = spec.request();
    // Nobody listens there, at either host.
    request.probes.push(ProbeSpec::Tcp((spec.address(), 81).into()));
    world.ask("a1", async |client| client.create_machine(&request).await).unwrap();
    world.wait_guest(&spec, "to be ready", |status| status.ready);
    let request = MigrateRequest {
        destination: "b1".into(),
        on_failed_probe: Some(OnFailedProbe::Return),
        ..MigrateRequest::default()
    };
    let started = world.ask("a1", async |client| client.migrate("vm1", &request).await).unwrap();
    let ended = world.wait_migration("a1", &started.id);
    assert_eq!(ended.stage, MigrationStage::Completed, "{ended:?}");
    assert!(ended.alarm.as_ref().is_some_and(|alarm| alarm.contains(":81")), "{ended:?}");
    let back = ended.returned_by.expect("it is moved back");
    let back = world.wait_migration("b1", &back);
    assert_eq!(back.stage, MigrationStage::Completed, "{back:?}\n{}", world.logs());
    assert_eq!((back.trigger.kind, back.destination.as_str()), (TriggerKind::Return, "a1"));
    assert!(back.alarm.is_some() && back.returned_by.is_none(), "once, whatever its probes say there: {back:?}");
    assert_eq!((world.machines_on("a1"), world.machines_on("b1")), (vec!["vm1".to_owned()], vec![]));
    for host in ["a1", "b1"] {
        let known = world.ask(host, async |client| client.migrations().await).unwrap();
        assert!(known.len() == 2 && known.iter().all(|migration| migration.stage.ended()), "{host}: {known:?}");
        let audit = world.ask(host, async |client| client.audit(200).await).unwrap();
        assert!(audit.iter().any(|record| record.action == "alarm"), "{host}: {audit:#?}");
    }
    let machine = world.ask("a1", async |client| client.machine("vm1").await).unwrap();
    assert_eq!(machine.status, MachineStatus::Running);
    assert!(machine.reason.is_some_and(|reason| reason.contains("probe")), "what is wrong with it is shown");
    world.check_oracles(&spec);
    world.finish();
}
