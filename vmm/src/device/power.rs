//! Reset and power-off: the keyboard controller's reset line and the PC's reset control register.

use super::BusDevice;

/// Ports of the keyboard controller: data, and status and command.
pub const KEYBOARD_PORTS: std::ops::Range<u16> = 0x60..0x65;
/// The reset control register.
pub const RESET_PORTS: std::ops::Range<u16> = 0xcf9..0xcfa;

const COMMAND_OFFSET: u64 = 4;
/// Pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;
/// The status register says that a command may be written and that no byte waits to be read.
const IDLE: u8 = 0;
/// Bit 2 starts the reset that bit 1 describes.
const START_RESET: u8 = 1 << 2;

/// What a write means.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Keyboard,
    ResetControl,
}

/// Asks the machine to stop when the guest resets it. A machine that is reset is not started again: whoever runs it
/// decides.
pub struct Power {
    kind: Kind,
    reset: Box<dyn FnMut() + Send>,
}

impl Power {
    /// A keyboard controller that can do nothing but reset.
    pub fn keyboard(reset: impl FnMut() + Send + 'static) -> Self {
        Self { kind: Kind::Keyboard, reset: Box::new(reset) }
    }

    /// The reset control register.
    pub fn reset_control(reset: impl FnMut() + Send + 'static) -> Self {
        Self { kind: Kind::ResetControl, reset: Box::new(reset) }
    }
}

impl BusDevice for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(IDLE);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let resets = match (self.kind, data) {
            (Kind::Keyboard, [value]) => offset == COMMAND_OFFSET && *value == PULSE_RESET,
            (Kind::ResetControl, [value]) => value & START_RESET != 0,
            _ => false,
        };
        if resets {
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
    fn only_the_reset_commands_reset() {
        let count = Arc::new(AtomicU32::new(0));
        let counter = || {
            let count = Arc::clone(&count);
            move || {
                count.fetch_add(1, Ordering::Relaxed);
            }
        };
        let mut keyboard = Power::keyboard(counter());
        keyboard.write(COMMAND_OFFSET, &[0xd1]);
        keyboard.write(0, &[PULSE_RESET]);
        let mut control = Power::reset_control(counter());
        control.write(0, &[2]);
        assert_eq!(count.load(Ordering::Relaxed), 0);
        keyboard.write(COMMAND_OFFSET, &[PULSE_RESET]);
        control.write(0, &[6]);
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }
}
