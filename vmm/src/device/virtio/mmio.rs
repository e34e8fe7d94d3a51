//! The memory-mapped transport, version 2 (virtio 1.2, section 4.2).

use std::sync::{Arc, Mutex, PoisonError};

use super::registers::{Half, Registers, Ring};
use crate::device::BusDevice;

/// Bytes in the register window of one device.
pub const WINDOW_BYTES: u64 = 0x1000;

/// Offset of the register that tells a device of new buffers.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// `virt` in little endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// `HDRM`: no value is prescribed.
const VENDOR: u32 = 0x4d52_4448;
/// Where the configuration space begins.
const CONFIG: u64 = 0x100;

/// Offsets of registers (table 4.1).
mod offset {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const DESCRIPTORS_LOW: u64 = 0x80;
    pub const DESCRIPTORS_HIGH: u64 = 0x84;
    pub const AVAILABLE_LOW: u64 = 0x90;
    pub const AVAILABLE_HIGH: u64 = 0x94;
    pub const USED_LOW: u64 = 0xa0;
    pub const USED_HIGH: u64 = 0xa4;
    /// Length of a shared memory region, low and high: all ones, as there is none.
    pub const SHM_LENGTH_LOW: u64 = 0xb0;
    pub const SHM_LENGTH_HIGH: u64 = 0xb4;
    pub const CONFIG_GENERATION: u64 = 0xfc;
}

/// The register window of one virtio device, to be put on the bus.
pub struct MmioTransport {
    registers: Arc<Mutex<Registers>>,
}

impl MmioTransport {
    pub(super) fn new(registers: Arc<Mutex<Registers>>) -> Self {
        Self { registers }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        if offset >= CONFIG {
            return registers.read_config((offset - CONFIG) as usize, data);
        }
        let Ok(data) = <&mut [u8; 4]>::try_from(&mut *data) else {
            return data.fill(0);
        };
        *data = read_register(&registers, offset).to_le_bytes();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        if offset >= CONFIG {
            registers.write_config((offset - CONFIG) as usize, data);
        } else if let Ok(&bytes) = <&[u8; 4]>::try_from(data) {
            write_register(&mut registers, offset, u32::from_le_bytes(bytes));
        }
    }
}

fn read_register(registers: &Registers, offset: u64) -> u32 {
    match offset {
        offset::MAGIC => MAGIC,
        offset::VERSION => VERSION,
        offset::DEVICE_ID => registers.device_id(),
        offset::VENDOR => VENDOR,
        offset::DEVICE_FEATURES => registers.device_features(),
        offset::QUEUE_MAX => registers.queue_max(),
        offset::QUEUE_READY => u32::from(registers.queue_ready()),
        offset::INTERRUPT_STATUS => registers.interrupt().status(),
        offset::STATUS => u32::from(registers.status()),
        offset::SHM_LENGTH_LOW | offset::SHM_LENGTH_HIGH => u32::MAX,
        offset::CONFIG_GENERATION => registers.interrupt().generation(),
        _ => 0,
    }
}

fn write_register(registers: &mut Registers, offset: u64, value: u32) {
    match offset {
        offset::DEVICE_FEATURES_SELECT => registers.select_device_features(value),
        offset::DRIVER_FEATURES => registers.set_driver_features(value),
        offset::DRIVER_FEATURES_SELECT => registers.select_driver_features(value),
        offset::QUEUE_SELECT => registers.select_queue(value),
        offset::QUEUE_SIZE => registers.set_queue_size(value),
        offset::QUEUE_READY => registers.set_queue_ready(value & 1 == 1),
        QUEUE_NOTIFY => registers.notify(value),
        offset::INTERRUPT_ACK => registers.interrupt().acknowledge(value),
        offset::STATUS => registers.set_status(value as u8),
        offset::DESCRIPTORS_LOW => registers.set_queue_address(Ring::Descriptors, Half::Low, value),
        offset::DESCRIPTORS_HIGH => registers.set_queue_address(Ring::Descriptors, Half::High, value),
        offset::AVAILABLE_LOW => registers.set_queue_address(Ring::Available, Half::Low, value),
        offset::AVAILABLE_HIGH => registers.set_queue_address(Ring::Available, Half::High, value),
        offset::USED_LOW => registers.set_queue_address(Ring::Used, Half::Low, value),
        offset::USED_HIGH => registers.set_queue_address(Ring::Used, Half::High, value),
        _ => {}
    }
}
