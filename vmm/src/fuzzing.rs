//! What the fuzz targets call: bytes from outside, given to whatever in this crate has to survive them.

use std::io::Write;
use std::sync::{Arc, OnceLock};

use migration::guest::{DeviceSlot, StatePayload};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use crate::device::virtio::fuzzing::{balloon, block_state, disk_request, new_block_state, virtqueue};

use crate::config::{MachineConfig, SerialConfig};
use crate::device::BusDevice;
use crate::device::keyboard::{self, Keyboard};
use crate::device::serial::{self, Console};
use crate::device::state::decode;
use crate::device::virtio::fuzzing::Deaf;
use crate::service::{Service, Started};

/// A request on the VMM's API socket, head and body.
pub fn api(data: &[u8]) {
    static SERVICE: OnceLock<Option<Service>> = OnceLock::new();
    let service = SERVICE.get_or_init(|| {
        let config = serde_json::from_str(r#"{"name": "vm1", "memory_mib": 64}"#).ok()?;
        Some(Service::new(config, None, Started::now(), EventFd::new(EFD_NONBLOCK).ok()?))
    });
    if let Some(service) = service {
        crate::api::server::fuzz(data, service);
    }
}

/// A VMM's configuration.
pub fn config(data: &[u8]) {
    drop(serde_json::from_slice::<MachineConfig>(data));
}

/// The `machine` file of a snapshot.
pub fn snapshot(data: &[u8]) {
    // Few inputs have the right checksum: it is given to those that begin so.
    let bytes = match data.split_first() {
        Some((b'+', body)) => crate::snapshot::head(body).into_iter().chain(body.iter().copied()).collect(),
        _ => data.to_vec(),
    };
    let memfd = nix::sys::memfd::memfd_create("fuzz", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let Ok(mut file) = memfd.map(std::fs::File::from) else { return };
    if file.write_all(&bytes).is_ok() {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        crate::snapshot::read_head(path.as_ref());
    }
}

/// The saved state of a processor, a clock, the interrupt controller, the serial port or the keyboard; the first byte says which. What a
/// keyboard takes over it also has to live with.
pub fn state(data: &[u8]) {
    let Some((&which, bytes)) = data.split_first() else { return };
    let slot = DeviceSlot { name: "fuzz".to_owned(), version: 1 };
    let payload = StatePayload { slot: slot.clone(), bytes: bytes.to_vec() };
    match which % 5 {
        0 => drop(decode::<crate::vcpu::state::VcpuStateV1>(&slot, &payload)),
        1 => drop(decode::<crate::kvm::clock::ClockStateV1>(&slot, &payload)),
        2 => drop(decode::<crate::kvm::irq::IrqchipStateV1>(&slot, &payload)),
        3 => {
            let serial = StatePayload { slot: serial::slot(), bytes: bytes.to_vec() };
            if let Ok(console) = Console::new(&SerialConfig::Off, Arc::new(Deaf))
                && console.restore(&serial).is_ok()
            {
                assert!(console.save().is_ok());
            }
        }
        _ => {
            let saved = StatePayload { slot: keyboard::slot(), bytes: bytes.to_vec() };
            let mut keyboard = Keyboard::new(Arc::new(Deaf), || {});
            if keyboard.restore(&saved).is_ok() {
                keyboard.press();
                for port in 0..=4 {
                    keyboard.read(port, &mut [0]);
                    keyboard.write(port, &[0xff]);
                }
                assert!(
                    keyboard.save().is_ok_and(|again| Keyboard::new(Arc::new(Deaf), || {}).restore(&again).is_ok())
                );
            }
        }
    }
}
