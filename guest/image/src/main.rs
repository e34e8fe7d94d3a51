//! The bundled guest's program. Ring 0 is the assembled part in `ring0/entry.s`; everything else is here, in ring 3.

#![no_std]
#![no_main]

extern crate alloc;

mod console;
mod guest;
mod memory;
mod net;
mod oracle;
mod port;
mod power;
#[path = "../../src/protocol/mod.rs"]
#[allow(dead_code)] // The library uses the rest of it.
mod protocol;
mod ring0;
mod runtime;
mod time;
mod virtio;
mod work;

use guest::Guest;
use net::Network;
use protocol::command_line::{CommandLine, MmioDevice};
use protocol::workload::Workload;
use time::{Clock, Timer, timer};
use virtio::balloon::Balloon;
use virtio::block::Block;
use virtio::net::Net;
use virtio::{Device, Unusable};
use virtio_drivers::transport::DeviceType;
use work::disk::Disk;

/// Where ring 0 ends and Rust begins.
#[unsafe(no_mangle)]
extern "C" fn ring3_entry() -> ! {
    console::init();
    let memory = memory::init();
    let clock = Clock::new();
    let timer = Timer::new(&clock);
    let CommandLine { workload, devices, rejected } = CommandLine::parse(&memory.command_line);
    say!("headroom-guest {} MiB of RAM, clock: {clock}", memory.ram_bytes >> 20);
    for word in rejected {
        say!("headroom-guest ignores {word:?}: its value cannot be read");
    }
    let mut found = Found::default();
    // Interrupt source 0 is the timer, the last one the keyboard.
    for (device, source) in devices.iter().zip(1..power::KEYBOARD_SOURCE) {
        if let Err(error) = found.open(device, source, &workload, &clock) {
            say!("headroom-guest cannot use the device at {:#x}: {error}", device.base);
        }
    }
    power::listen();
    let work = work::memory::Memory::new(memory.area, workload.fill_mib);
    let Found { disk, network, balloon } = found;
    Guest::new(clock, timer, workload, work, disk, network, balloon).run()
}

/// The first device of each kind.
#[derive(Default)]
struct Found {
    disk: Option<Disk>,
    network: Option<Network>,
    balloon: Option<work::balloon::Balloon>,
}

impl Found {
    fn open(&mut self, window: &MmioDevice, source: usize, workload: &Workload, clock: &Clock) -> Result<(), Unusable> {
        let device = Device::new(window, source)?;
        match device.kind() {
            DeviceType::Block if self.disk.is_none() => {
                let block = Block::new(device, oracle::verifier::CHUNK_BYTES)?;
                say!("headroom-guest disk: {} MiB", block.bytes() >> 20);
                self.disk = Some(Disk::new(block));
            }
            DeviceType::Network if self.network.is_none() => {
                let (net, mac) = Net::new(device)?;
                say!("headroom-guest network: {mac:02x?}");
                let seed = ring0::facts().entry_tsc;
                self.network = Some(Network::new(net, mac, workload, seed, clock.now()));
            }
            DeviceType::MemoryBalloon if self.balloon.is_none() => {
                let balloon = Balloon::new(device)?;
                let reports = if balloon.can_report() { ", reports free memory" } else { "" };
                say!("headroom-guest balloon{reports}");
                self.balloon = Some(work::balloon::Balloon::new(balloon));
            }
            _ => return Ok(()),
        }
        timer::route(window.gsi, source);
        Ok(())
    }
}
