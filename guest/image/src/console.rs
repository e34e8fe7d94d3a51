//! The serial port: a 16550 at 0x3f8, written without interrupts.

use core::fmt::{self, Write};

use crate::port;

const DATA: u16 = 0x3f8;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_STATUS: u16 = DATA + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;
const FIFO_BYTES: usize = 16;
/// Looks at the line status before a slow port is written to all the same.
const PATIENCE: u32 = 10_000;

/// Switches the port's FIFOs on and clears them.
pub fn init() {
    port::write(FIFO_CONTROL, 0x07);
}

/// The serial port as a writer. Each access is an exit of the virtual machine, so the line status is read once for each
/// FIFO full of bytes.
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for part in text.as_bytes().chunks(FIFO_BYTES) {
            for _ in 0..PATIENCE {
                if port::read(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
                    break;
                }
            }
            for &byte in part {
                port::write(DATA, byte);
            }
        }
        Ok(())
    }
}

/// Writes a formatted line to the serial port.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        // The writer never fails.
        let _ = writeln!($crate::console::Console, $($argument)*);
    }};
}
