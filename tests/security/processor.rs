//! A source whose machine knows a processor that is not here, told to a real VMM that waits for it. The daemons compare
//! processors before anything is reserved (tests/faults/processor.rs); this is the engine's own check, for a daemon that
//! did not.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

use hostd::lab::{HostSpec, Lab};
use migration::control::Control;
use migration::guest::{GuestError, GuestResult, MachineLayout, SourceDisk, SourceGuest, StatePayload};
use migration::page::Bitmap;
use migration::policy::Limits;
use migration::report::{Outcome, Report};
use migration::source::SourceOptions;
use migration::transport::tls::Identity;
use tests::{Need, ready};
use vmm::api::MachineState;
use vmm::vm::Machine;

use crate::waiting::{TOKEN, Vmm, config, identity, receive_config};

/// Announces a machine, and has nothing else: a destination that takes it asks for more, and is told so.
struct Boaster(MachineLayout);

fn nothing<T>() -> GuestResult<T> {
    Err(GuestError::new("the destination has accepted a processor that it does not have"))
}

impl SourceGuest for Boaster {
    fn layout(&self) -> GuestResult<MachineLayout> {
        Ok(self.0.clone())
    }

    /// Begins while the destination builds the machine, or refuses to.
    fn start_dirty_tracking(&self) -> GuestResult<()> {
        Ok(())
    }

    fn stop_dirty_tracking(&self) -> GuestResult<()> {
        Ok(())
    }

    fn collect_dirty(&self, _: &mut Bitmap) -> GuestResult<()> {
        nothing()
    }

    fn next_populated(&self, from: u64) -> GuestResult<Option<Range<u64>>> {
        Ok((from == 0).then_some(0..1))
    }

    fn read_pages(&self, _: u64, _: &mut [u8]) -> GuestResult<()> {
        nothing()
    }

    fn pause(&self) -> GuestResult<()> {
        nothing()
    }

    fn resume(&self) -> GuestResult<()> {
        Ok(())
    }

    fn save_state(&self) -> GuestResult<Vec<StatePayload>> {
        nothing()
    }

    fn fence(&self) -> GuestResult<()> {
        nothing()
    }

    fn unfence(&self) -> GuestResult<()> {
        Ok(())
    }

    fn disks(&self) -> Vec<Arc<dyn SourceDisk>> {
        Vec::new()
    }
}

/// The layout of a machine as `name` runs on this computer.
fn layout(lab: &Lab, name: &str) -> MachineLayout {
    let config = config(lab.host("a1").unwrap(), name, false);
    Machine::boot(config).unwrap().layout()
}

fn send(lab: &Lab, address: SocketAddr, layout: MachineLayout) -> Report {
    let host = lab.host("a1").unwrap();
    let tls = identity(host.tls());
    let options = SourceOptions {
        id: "mig-1".into(),
        address,
        token: TOKEN,
        source_host: "a1".into(),
        destination_host: "b1".into(),
        identity: Identity { ca_pem: tls.ca_pem, certificate_pem: tls.certificate_pem, key_pem: tls.key_pem },
        limits: Limits::default(),
        trigger: Default::default(),
    };
    let run = || migration::source::run(Arc::new(Boaster(layout)), options, &Control::new());
    host.namespace().run(run).unwrap()
}

#[test]
fn a_processor_with_more_features_or_of_another_make_is_refused_before_anything_moves() {
    if !ready(Need::Kvm) {
        return;
    }
    let lab = Lab::new(&[HostSpec::new("a1", "a"), HostSpec::new("b1", "b")]).unwrap();
    let honest = layout(&lab, "layout");
    let mut featured = honest.clone();
    let leaf = featured.cpu.leaves.iter_mut().find(|leaf| (leaf[0], leaf[1]) == (1, 0)).expect("CPUID leaf 1");
    // Register ECX, bit 5: VMX, which is shown to no guest here or on AMD; and if it were, bit 6, SMX.
    let bit = if leaf[4] & 1 << 5 == 0 { 1 << 5 } else { 1 << 6 };
    leaf[4] |= bit;
    let mut foreign = honest;
    let leaf = foreign.cpu.leaves.iter_mut().find(|leaf| leaf[0] == 0).expect("CPUID leaf 0");
    leaf[3] ^= 0x0101_0101;
    let cases = [
        (featured, ["lacks CPU features", "CPUID 0x1.0 ECX bit", "choose a destination"]),
        (foreign, ["processor", "this host has", "same make"]),
    ];
    for (number, (layout, expected)) in cases.into_iter().enumerate() {
        let host = lab.host("b1").unwrap();
        let destination = Vmm::start(host, &format!("destination{number}"), true);
        let address = destination.client.receive(&receive_config(host)).unwrap().address;
        let report = send(&lab, address, layout);
        assert_eq!(report.outcome, Outcome::Failed, "{report:?}");
        for part in expected {
            assert!(report.reason.contains(part), "`{part}` is not in the reason: {}", report.reason);
        }
        assert_eq!(report.memory.bytes_sent, 0, "something was moved first");
        assert_ne!(destination.client.machine().unwrap().state, MachineState::Running);
    }
    lab.remove().unwrap();
}
