//! The first serial port: a 16550 at port 0x3f8, GSI 4, by vm-superio.

use std::io::{self, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::guest::{DeviceSlot, StatePayload};
use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use super::bounded::Bounded;
use super::state::{self, StateError};
use super::{BusDevice, Line};
use crate::config::SerialConfig;

/// Its ports.
pub const PORTS: Range<u16> = 0x3f8..0x400;

type Output = Box<dyn Write + Send>;
type Uart = Serial<Edge, NoEvents, Output>;

/// The console cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the serial console's file {path} for appending: check the path and its permissions")]
pub struct SerialError {
    path: std::path::PathBuf,
    #[source]
    source: io::Error,
}

/// The interrupt line.
struct Edge(Arc<dyn Line>);

impl Trigger for Edge {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.pulse()
    }
}

/// The console of a machine. A clone is the same one.
#[derive(Clone)]
pub struct Console {
    uart: Arc<Mutex<Uart>>,
}

/// Saved state, version 1.
#[derive(Serialize, Deserialize)]
struct SerialStateV1 {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

/// Name and version of the saved state.
pub fn slot() -> DeviceSlot {
    DeviceSlot { name: "serial".into(), version: 1 }
}

impl Console {
    /// A port as after a reset. `interrupt` is its line.
    ///
    /// # Errors
    ///
    /// [`SerialError`] if the file cannot be opened.
    pub fn new(config: &SerialConfig, interrupt: Arc<dyn Line>) -> Result<Self, SerialError> {
        let output: Output = match config {
            SerialConfig::Off => Box::new(io::sink()),
            SerialConfig::Stdio => Box::new(io::stdout()),
            SerialConfig::File(path) => {
                Box::new(Bounded::open(path).map_err(|source| SerialError { path: path.to_owned(), source })?)
            }
        };
        Ok(Self { uart: Arc::new(Mutex::new(Serial::new(Edge(interrupt), output))) })
    }

    /// Hands bytes to the guest, as many as the port has room for; returns how many.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        self.lock().enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// The state to travel; the vCPUs are parked.
    ///
    /// # Errors
    ///
    /// [`StateError`] if it cannot be encoded.
    pub fn save(&self) -> Result<StatePayload, StateError> {
        let state = self.lock().state();
        let saved = SerialStateV1 {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        };
        state::encode(slot(), &saved)
    }

    /// Takes over a saved state. An interrupt that was pending is in the saved interrupt controllers.
    ///
    /// # Errors
    ///
    /// [`StateError`] if the payload is not one of a serial port, or does not fit.
    pub fn restore(&self, payload: &StatePayload) -> Result<(), StateError> {
        let saved: SerialStateV1 = state::decode(&slot(), payload)?;
        let state = SerialState {
            baud_divisor_low: saved.divisor[0],
            baud_divisor_high: saved.divisor[1],
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.input,
        };
        let mut uart = self.lock();
        let line = Edge(Arc::clone(&uart.interrupt_evt().0));
        let unfit = |what: String| StateError::Unfit { device: slot().name, what };
        let output = std::mem::replace(uart.writer_mut(), Box::new(io::sink()));
        *uart = Serial::from_state(&state, line, NoEvents, output).map_err(|error| unfit(error.to_string()))?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Registers are one byte wide: of a wider access the first byte counts.
impl BusDevice for Console {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(byte) = data.first_mut() {
            *byte = self.lock().read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(&byte) = data.first() {
            // The console's other end may be gone (a closed pipe): the guest must not notice.
            let _ = self.lock().write(offset as u8, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    fn console(path: &std::path::Path) -> Console {
        let config = SerialConfig::File(path.to_owned());
        Console::new(&config, Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())).unwrap()
    }

    #[test]
    fn state_travels_with_unread_input() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut first = console(file.path());
        first.write(0, b"a");
        first.write(7, &[0x5a]);
        assert_eq!(first.receive(b"xyz"), 3);
        let mut byte = [0];
        first.read(0, &mut byte);
        assert_eq!(&byte, b"x");
        let saved = first.save().unwrap();

        let mut second = console(file.path());
        second.restore(&saved).unwrap();
        second.read(7, &mut byte);
        assert_eq!(byte, [0x5a]);
        second.read(0, &mut byte);
        assert_eq!(&byte, b"y");
        second.write(0, b"b");
        assert_eq!(std::fs::read(file.path()).unwrap(), b"ab");
    }

    #[test]
    fn refuses_more_input_than_the_port_holds() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = console(file.path());
        let mut state: SerialStateV1 = state::decode(&slot(), &first.save().unwrap()).unwrap();
        state.input = vec![0; 4096];
        let payload = state::encode(slot(), &state).unwrap();
        assert!(matches!(first.restore(&payload), Err(StateError::Unfit { .. })));
    }
}
