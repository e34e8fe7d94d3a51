//! The memory-mapped transport, version 2 (virtio 1.2, section 4.2).

use crate::device::BusDevice;

/// Bytes in the register window of one device.
pub const WINDOW_BYTES: u64 = 0x1000;

/// Offset of the register that tells a device of new buffers.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// The registers of one virtio device.
pub struct MmioTransport {
    _private: (),
}

impl BusDevice for MmioTransport {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}
