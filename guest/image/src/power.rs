//! Switching the machine off.

use crate::{port, ring0, say};

const KEYBOARD_CONTROLLER: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;

/// Ends the machine: by the keyboard controller's reset line, and where there is none by a triple fault. The VMM sees a
/// shutdown or reset.
pub fn off() -> ! {
    say!("headroom-guest power off");
    port::write(KEYBOARD_CONTROLLER, PULSE_RESET);
    ring0::triple_fault()
}
