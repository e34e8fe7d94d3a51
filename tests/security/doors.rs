//! The daemon's port, and the port of a VMM that waits for a machine.

use std::net::SocketAddr;
use std::time::Duration;

use hostd::config::TlsPaths;
use hostd::lab::host::PEER_PORT;
use hostd::lab::{HostSpec, Lab, interrupt};
use hostd::security::pki;
use migration::report::Outcome;
use tests::world::{DEADLINE, Spec, World};
use tests::{Need, ready};
use vmm::api::MachineState;
use vmm::config::{MigrationLimits, SendConfig};

use crate::strangers;
use crate::waiting::{TOKEN, Vmm, hex, identity, receive_config};

/// Everything that must not get in, tried from the observer's place.
fn knock(lab: &Lab, name: &str, address: SocketAddr) {
    let other = lab.directory().join("another-authority");
    if !other.exists() {
        pki::create_authority(&other, "another").unwrap();
    }
    let ca = lab.authority().join("ca.pem");
    // Signed by a stranger, but with the right name and with trust in the server.
    let foreign = other.join("a1.pem").exists().then(|| TlsPaths {
        ca: ca.clone(),
        certificate: other.join("a1.pem"),
        key: other.join("a1.key"),
    });
    let foreign = foreign.unwrap_or_else(|| pki::issue(&other, "a1").unwrap());
    lab.observer()
        .run(|| {
            for (what, bytes) in strangers::garbage() {
                let answer = strangers::send(address, &bytes);
                assert!(answer.len() < 64, "{what} was answered with {} bytes: {answer:?}", answer.len());
            }
            let refused = |what: &str, output: &str, reason: &[&str]| {
                let found = reason.iter().any(|reason| output.to_lowercase().contains(reason));
                assert!(found, "{what}: openssl says\n{output}");
                assert!(!output.contains("HTTP/1.1 200"), "{what} was answered:\n{output}");
            };
            let output = strangers::openssl(address, name, &ca, None, "-tls1_3");
            refused("no certificate", &output, &["certificate required"]);
            let output = strangers::openssl(address, name, &ca, Some(&foreign), "-tls1_3");
            refused(
                "another authority",
                &output,
                &["unknown ca", "certificate unknown", "bad certificate", "decrypt error"],
            );
            let output = strangers::openssl(address, name, &ca, Some(&foreign), "-tls1_2");
            refused("TLS 1.2", &output, &["protocol version"]);
        })
        .unwrap();
}

#[test]
fn a_daemon_lets_no_stranger_in_and_goes_on() {
    if !ready(Need::Kvm) {
        return;
    }
    let world = World::two_hosts();
    let spec = Spec::busy("vm1", 0);
    world.boot("a1", &spec);
    for host in ["a1", "b1"] {
        knock(&world.lab, host, (world.host(host).address(), PEER_PORT).into());
    }
    world.moves(&spec, "a1", "b1", None);
    // It is written down who was refused.
    let audit = world.ask("a1", async |client| client.audit(200).await).unwrap();
    assert!(audit.iter().any(|record| record.decision == hostd::api::types::Decision::Denied), "{audit:#?}");
    world.finish();
}

#[test]
fn a_vmm_that_waits_for_a_machine_takes_it_only_from_the_one_who_may() {
    if !ready(Need::Kvm) {
        return;
    }
    let lab = Lab::new(&[HostSpec::new("a1", "a"), HostSpec::new("b1", "b"), HostSpec::new("c1", "b")]).unwrap();
    let (a1, b1, c1) = (lab.host("a1").unwrap(), lab.host("b1").unwrap(), lab.host("c1").unwrap());
    let (source, destination) = (Vmm::start(a1, "source", false), Vmm::start(b1, "destination", true));
    let address = destination.client.receive(&receive_config(b1)).unwrap().address;
    knock(&lab, "b1", address);
    assert_eq!(destination.client.machine().unwrap().state, MachineState::Incoming);

    let send = SendConfig {
        id: "mig-1".into(),
        address,
        token: hex(&TOKEN),
        source_host: "a1".into(),
        destination_host: "b1".into(),
        tls: identity(a1.tls()),
        limits: MigrationLimits::default(),
        pause_before_switchover: false,
        trigger: Default::default(),
    };
    let attempt = |change: &dyn Fn(&mut SendConfig)| {
        let mut config = send.clone();
        change(&mut config);
        let error = source.client.send(&config).err().map(|error| error.to_string());
        let ended = interrupt::poll("the end of the attempt", DEADLINE, Duration::from_millis(10), || {
            Ok(source.client.migration().ok().flatten().filter(|status| error.is_some() || status.report.is_some()))
        });
        let report = ended.ok().and_then(|status| status.report);
        (error, report)
    };
    // The right authority, but another host of it; and the right host with a wrong secret. Both fail, with the cause, and
    // the machine runs on.
    type Change<'a> = &'a dyn Fn(&mut SendConfig);
    let wrong: [(&str, Change<'_>); 2] = [
        ("another host", &|config| config.tls = identity(c1.tls())),
        ("a wrong token", &|config| config.token = hex(&TOKEN).replace('6', "7")),
    ];
    for (what, change) in wrong {
        let (error, report) = attempt(change);
        let outcome = report.as_ref().map(|report| report.outcome);
        assert!(error.is_some() || outcome == Some(Outcome::Failed), "{what}: {error:?} {report:?}");
        assert_eq!(source.client.machine().unwrap().state, MachineState::Running, "{what}");
        assert_ne!(destination.client.machine().unwrap().state, MachineState::Running, "{what}");
    }
    let (error, report) = attempt(&|_| ());
    let outcome = report.as_ref().map(|report| report.outcome);
    assert_eq!(outcome, Some(Outcome::Completed), "{error:?} {report:?}");
    assert_eq!(destination.client.machine().unwrap().state, MachineState::Running);
    drop((source, destination));
    lab.remove().unwrap();
}
