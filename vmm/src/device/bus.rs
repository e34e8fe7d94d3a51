//! Who answers at which address: memory-mapped windows and I/O ports.
//!
//! Devices are put on the bus while the machine is built or restored; afterwards it only changes by being dropped. A read
//! where nobody answers gives all ones, as on a PC; a write is lost.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::BusDevice;

type Shared = Arc<Mutex<dyn BusDevice>>;

/// The two address spaces of a machine. A clone is the same bus.
#[derive(Clone, Default)]
pub struct Bus {
    mmio: Arc<Space>,
    ports: Arc<Space>,
}

#[derive(Default)]
struct Space {
    windows: RwLock<Vec<(Range<u64>, Shared)>>,
}

/// Two devices want the same addresses.
#[derive(Debug, thiserror::Error)]
#[error("the register window {wanted:x?} overlaps {taken:x?}: a machine cannot have that many devices")]
pub struct Overlap {
    /// The new window.
    pub wanted: Range<u64>,
    /// The window that is there.
    pub taken: Range<u64>,
}

impl Space {
    fn insert(&self, window: Range<u64>, device: Shared) -> Result<(), Overlap> {
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        let overlaps = |taken: &Range<u64>| taken.start < window.end && window.start < taken.end;
        if let Some((taken, _)) = windows.iter().find(|(taken, _)| overlaps(taken)) {
            return Err(Overlap { wanted: window, taken: taken.clone() });
        }
        windows.push((window, device));
        Ok(())
    }

    fn find(&self, address: u64) -> Option<(u64, Shared)> {
        let windows = self.windows.read().unwrap_or_else(PoisonError::into_inner);
        let (window, device) = windows.iter().find(|(window, _)| window.contains(&address))?;
        Some((address - window.start, Arc::clone(device)))
    }

    fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }
}

impl Bus {
    /// Gives a device a window of guest-physical memory.
    ///
    /// # Errors
    ///
    /// [`Overlap`] if another device is there.
    pub fn insert_mmio(&self, window: Range<u64>, device: Shared) -> Result<(), Overlap> {
        self.mmio.insert(window, device)
    }

    /// Gives a device a range of I/O ports.
    ///
    /// # Errors
    ///
    /// [`Overlap`] if another device is there.
    pub fn insert_ports(&self, ports: Range<u16>, device: Shared) -> Result<(), Overlap> {
        self.ports.insert(ports.start.into()..ports.end.into(), device)
    }

    /// The guest reads memory that is not RAM.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }

    /// The guest writes memory that is not RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        self.mmio.write(address, data);
    }

    /// The guest reads a port once.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port.into(), data);
    }

    /// The guest writes a port once.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        self.ports.write(port.into(), data);
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |space: &Space| space.windows.read().map_or(0, |windows| windows.len());
        write!(formatter, "Bus({} windows, {} port ranges)", count(&self.mmio), count(&self.ports))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<u8>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.copy_from_slice(&self.0[offset as usize..offset as usize + data.len()]);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0[offset as usize..offset as usize + data.len()].copy_from_slice(data);
        }
    }

    #[test]
    fn accesses_reach_the_device_at_their_offset() {
        let bus = Bus::default();
        bus.insert_mmio(0x1000..0x2000, Arc::new(Mutex::new(Echo(vec![0; 0x1000])))).unwrap();
        bus.mmio_write(0x1010, &[1, 2]);
        let mut data = [0; 3];
        bus.mmio_read(0x100f, &mut data);
        assert_eq!(data, [0, 1, 2]);
        bus.mmio_write(0x2000, &[9]);
        bus.mmio_read(0x2000, &mut data);
        assert_eq!(data, [0xff; 3]);
        bus.port_read(0x1010, &mut data);
        assert_eq!(data, [0xff; 3]);
        assert!(bus.insert_mmio(0x1fff..0x2fff, Arc::new(Mutex::new(Echo(vec![])))).is_err());
        bus.insert_mmio(0x2000..0x3000, Arc::new(Mutex::new(Echo(vec![])))).unwrap();
    }
}
