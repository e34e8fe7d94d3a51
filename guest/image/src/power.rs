//! Switching the machine off: at somebody's wish, which the keyboard says, and how.

use crate::time::timer;
use crate::{port, ring0, say};

const DATA: u16 = 0x60;
const STATUS_AND_COMMAND: u16 = 0x64;

const OUTPUT_FULL: u8 = 1;
const WRITE_CONTROL: u8 = 0x60;
/// Interrupts, and scan codes of set 1.
const CONTROL: u8 = 0x41;
const PULSE_RESET: u8 = 0xfe;

/// Its line on every PC.
const KEYBOARD_GSI: u32 = 1;
/// The last interrupt source; devices have those before it.
pub const KEYBOARD_SOURCE: usize = ring0::SOURCES - 1;
/// Scan code of Del. The other two keys of Ctrl-Alt-Del do not matter: nobody types here.
const DELETE: u8 = 0x53;
/// Bytes that a keyboard holds; where no controller is, there is always one more.
const BYTES_MAX: usize = 16;

/// Listens to the keyboard.
pub fn listen() {
    timer::route(KEYBOARD_GSI, KEYBOARD_SOURCE);
    port::write(STATUS_AND_COMMAND, WRITE_CONTROL);
    port::write(DATA, CONTROL);
}

/// Whether somebody has asked for an end since this was asked last.
pub fn asked() -> bool {
    if !ring0::take_wake(KEYBOARD_SOURCE) {
        return false;
    }
    let full = |_: &usize| port::read(STATUS_AND_COMMAND) & OUTPUT_FULL != 0;
    (0..BYTES_MAX).take_while(full).filter(|_| port::read(DATA) == DELETE).count() > 0
}

/// Ends the machine: by the keyboard controller's reset line, and where there is none by a triple fault. The VMM sees a
/// shutdown or reset.
pub fn off() -> ! {
    say!("headroom-guest power off");
    port::write(STATUS_AND_COMMAND, PULSE_RESET);
    ring0::triple_fault()
}
