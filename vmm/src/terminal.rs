//! Standard input as the machine's keyboard.

use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::termios::{self, SetArg, Termios};

use crate::device::serial::Console;

/// How often a full serial port is tried again: a key that the guest does not take yet must not be lost.
const RETRY: Duration = Duration::from_millis(10);

/// The terminal, raw while this lives, so that Ctrl-C and the like reach the guest.
pub struct Terminal {
    before: Option<Termios>,
}

impl Terminal {
    /// Hands what is typed to `console`. Does nothing if standard input is not a terminal.
    ///
    /// # Errors
    ///
    /// If the terminal refuses to change its mode, or a thread cannot be started.
    pub fn start(console: Console) -> io::Result<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self { before: None });
        }
        let before = termios::tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        // Output stays as it was: log lines end with a newline only.
        raw.output_flags = before.output_flags;
        termios::tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        let terminal = Self { before: Some(before) };
        std::thread::Builder::new().name("terminal".into()).spawn(move || forward(&console))?;
        Ok(terminal)
    }
}

fn forward(console: &Console) {
    let mut buffer = [0; 64];
    while let Ok(count @ 1..) = io::stdin().lock().read(&mut buffer) {
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            let taken = console.receive(rest);
            rest = &rest[taken..];
            if taken == 0 {
                std::thread::sleep(RETRY);
            }
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = termios::tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, before);
        }
    }
}
