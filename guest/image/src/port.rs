//! Port I/O, which the task's I/O bitmap allows to ring 3.

use core::arch::asm;

/// Writes one byte to a port.
pub fn write(port: u16, value: u8) {
    // SAFETY: ports reach devices only; no device here has port I/O that writes memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads one byte from a port; 0xff where no device answers.
pub fn read(port: u16) -> u8 {
    let value;
    // SAFETY: as for `write`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}
