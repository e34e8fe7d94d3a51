//! Reset by the PC's reset control register. The keyboard controller has a reset line as well.

use super::BusDevice;

/// The reset control register.
pub const RESET_PORTS: std::ops::Range<u16> = 0xcf9..0xcfa;

/// Bit 2 starts the reset that bit 1 describes.
const START_RESET: u8 = 1 << 2;

/// Asks the machine to stop when the guest resets it. A machine that is reset is not started again: whoever runs it
/// decides.
pub struct ResetControl {
    reset: Box<dyn FnMut() + Send>,
}

impl ResetControl {
    /// The register; `reset` is called when the guest resets the machine.
    pub fn new(reset: impl FnMut() + Send + 'static) -> Self {
        Self { reset: Box::new(reset) }
    }
}

impl BusDevice for ResetControl {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if matches!(data, [value] if value & START_RESET != 0) {
            (self.reset)();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn only_the_bit_that_starts_it_resets() {
        let count = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&count);
        let mut control = ResetControl::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        control.write(0, &[2]);
        control.write(0, &[6, 0]);
        assert_eq!(count.load(Ordering::Relaxed), 0);
        control.write(0, &[6]);
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }
}
