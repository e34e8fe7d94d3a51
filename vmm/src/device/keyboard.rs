//! The keyboard controller (i8042) with a keyboard on it: how a guest is asked to shut down, and how it resets the machine.
//!
//! Nobody types here. The one thing that the keyboard ever says by itself is Ctrl-Alt-Del, which every PC operating system
//! knows: Linux restarts (`kernel/reboot.c`), by way of its first process if that wants to know. The restart ends in the controller's
//! reset line, and so in the end of the machine.
//!
//! ```text
//!   press ──> queue of the keyboard ──> output register ──> port 0x60, interrupt 1
//!   commands of the controller (port 0x64), answers ──^      (the keyboard's bytes wait while it is disabled)
//! ```
//!
//! There is no mouse: the two commands by which drivers look for one are answered so that they do not wait for it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::guest::{DeviceSlot, StatePayload};
use serde::{Deserialize, Serialize};

use super::state::{self, StateError};
use super::{BusDevice, Line};

/// Its ports: data, and status and command; those in between belong to others.
pub const PORTS: Range<u16> = 0x60..0x65;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

// Status register.
const OUTPUT_FULL: u8 = 1;
const SYSTEM: u8 = 1 << 2;
/// Without it drivers believe that the keyboard is locked by a key.
const UNLOCKED: u8 = 1 << 4;

// Control byte.
const INTERRUPT: u8 = 1;
const DISABLED: u8 = 1 << 4;
const MOUSE_DISABLED: u8 = 1 << 5;
const TRANSLATE: u8 = 1 << 6;

/// The controller's answer to its self-test.
const TEST_PASSED: u8 = 0x55;
/// "The mouse's clock line is stuck": there is none.
const NO_MOUSE: u8 = 1;

const ACKNOWLEDGE: u8 = 0xfa;

/// Ctrl, Alt and Del go down, and up again: as the keyboard says it (set 2), and as the controller translates it (set 1).
const PRESS: &[u8] = &[0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];
const PRESS_TRANSLATED: &[u8] = &[0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];

/// Most bytes that wait in the keyboard, as in a real one; what comes beyond is lost.
const QUEUE_MAX: usize = 16;

/// Name and version of the saved state.
pub fn slot() -> DeviceSlot {
    DeviceSlot { name: "keyboard".into(), version: 1 }
}

/// The controller; a clone is the same one.
#[derive(Clone)]
pub struct Keyboard {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    state: KeyboardStateV1,
    interrupt: Arc<dyn Line>,
    reset: Box<dyn FnMut() + Send>,
}

/// Saved state, version 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct KeyboardStateV1 {
    control: u8,
    /// Whom the next byte at the data port is for.
    next: Next,
    output: Option<u8>,
    queue: VecDeque<u8>,
}

/// Whom a byte at the data port is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Next {
    /// The keyboard: a command.
    Keyboard,
    /// The keyboard: the parameter of a command, which changes nothing here.
    Parameter,
    /// The controller: the control byte.
    Control,
    /// The controller: the output port, bit 0 of which is the reset line.
    OutputPort,
    /// The controller, which gives it back.
    Loop,
    /// A mouse.
    Nobody,
}

impl Keyboard {
    /// A controller as after a reset. `interrupt` is its line, `reset` is called when the guest pulls the machine's reset line.
    pub fn new(interrupt: Arc<dyn Line>, reset: impl FnMut() + Send + 'static) -> Self {
        let state = KeyboardStateV1 {
            control: SYSTEM | MOUSE_DISABLED | TRANSLATE,
            next: Next::Keyboard,
            output: None,
            queue: VecDeque::new(),
        };
        Self { inner: Arc::new(Mutex::new(Inner { state, interrupt, reset: Box::new(reset) })) }
    }

    /// Whether a driver has switched it on.
    pub fn listens(&self) -> bool {
        self.lock().listens()
    }

    /// Presses Ctrl-Alt-Del. False if no driver listens: nothing happens then.
    pub fn press(&self) -> bool {
        let mut inner = self.lock();
        if !inner.listens() {
            return false;
        }
        // What is there already was not read for whatever reason: one press is enough, and half a press is none.
        if inner.state.queue.is_empty() {
            let keys = if inner.state.control & TRANSLATE == 0 { PRESS } else { PRESS_TRANSLATED };
            inner.state.queue.extend(keys);
            inner.offer();
        }
        true
    }

    /// The state to travel; the vCPUs are parked.
    ///
    /// # Errors
    ///
    /// [`StateError`] if it cannot be encoded.
    pub fn save(&self) -> Result<StatePayload, StateError> {
        state::encode(slot(), &self.lock().state)
    }

    /// Takes over a saved state. An interrupt that was pending is in the saved interrupt controllers.
    ///
    /// # Errors
    ///
    /// [`StateError`] if the payload is not one of a keyboard controller, or does not fit.
    pub fn restore(&self, payload: &StatePayload) -> Result<(), StateError> {
        let saved: KeyboardStateV1 = state::decode(&slot(), payload)?;
        if saved.queue.len() > QUEUE_MAX {
            let what = format!("{} bytes wait, at most {QUEUE_MAX} can", saved.queue.len());
            return Err(StateError::Unfit { device: slot().name, what });
        }
        self.lock().state = saved;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn listens(&self) -> bool {
        self.state.control & (INTERRUPT | DISABLED) == INTERRUPT
    }

    /// A command of the controller.
    fn command(&mut self, command: u8) {
        let state = &mut self.state;
        state.next = Next::Keyboard;
        match command {
            0x20 => state.output = Some(state.control),
            0x60 => state.next = Next::Control,
            0xa7 => state.control |= MOUSE_DISABLED,
            0xa8 => {}
            0xa9 => state.output = Some(NO_MOUSE),
            0xaa => state.output = Some(TEST_PASSED),
            0xab => state.output = Some(0),
            0xad => state.control |= DISABLED,
            0xae => self.set_control(self.state.control & !DISABLED),
            0xd1 => state.next = Next::OutputPort,
            0xd2 | 0xd3 => state.next = Next::Loop,
            0xd4 => state.next = Next::Nobody,
            // Pulses the lines of which the bits are zero; bit 0 is the reset.
            0xf0..=0xff if command & 1 == 0 => (self.reset)(),
            _ => {}
        }
    }

    fn set_control(&mut self, control: u8) {
        self.state.control = control;
        self.offer();
    }

    fn data(&mut self, byte: u8) {
        match std::mem::replace(&mut self.state.next, Next::Keyboard) {
            Next::Keyboard => self.keyboard(byte),
            Next::Parameter => self.say(&[ACKNOWLEDGE]),
            // Whatever the guest writes there, there is no mouse to be enabled.
            Next::Control => self.set_control(byte | MOUSE_DISABLED),
            Next::OutputPort if byte & 1 == 0 => (self.reset)(),
            Next::Loop => self.state.output = Some(byte),
            Next::OutputPort | Next::Nobody => {}
        }
    }

    /// A command of the keyboard.
    fn keyboard(&mut self, command: u8) {
        match command {
            // Lamps, scan code set, repeat rate: a parameter follows.
            0xed | 0xf0 | 0xf3 => {
                self.state.next = Next::Parameter;
                self.say(&[ACKNOWLEDGE]);
            }
            0xee => self.say(&[0xee]),
            // An ordinary keyboard, which says what it is.
            0xf2 => self.say(&[ACKNOWLEDGE, 0xab, 0x83]),
            // Its reset, and the test that follows.
            0xff => self.say(&[ACKNOWLEDGE, 0xaa]),
            _ => self.say(&[ACKNOWLEDGE]),
        }
    }

    fn say(&mut self, bytes: &[u8]) {
        if self.state.queue.len() + bytes.len() <= QUEUE_MAX {
            self.state.queue.extend(bytes);
        }
        self.offer();
    }

    /// Puts the keyboard's next byte where the guest reads it, and tells the guest.
    fn offer(&mut self) {
        let state = &mut self.state;
        if state.output.is_some() || state.control & DISABLED != 0 {
            return;
        }
        state.output = state.queue.pop_front();
        if state.output.is_some() && state.control & INTERRUPT != 0 && self.interrupt.pulse().is_err() {
            tracing::warn!(
                "the keyboard's interrupt could not be raised: the guest may not see that it is asked to shut down"
            );
        }
    }
}

/// Registers are one byte wide.
impl BusDevice for Keyboard {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(byte) = data.first_mut() else { return };
        let mut inner = self.lock();
        match offset {
            DATA => {
                *byte = inner.state.output.take().unwrap_or(0);
                inner.offer();
            }
            COMMAND => {
                let full = if inner.state.output.is_some() { OUTPUT_FULL } else { 0 };
                *byte = SYSTEM | UNLOCKED | full;
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let [byte] = *data else { return };
        match offset {
            DATA => self.lock().data(byte),
            COMMAND => self.lock().command(byte),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    struct Bench {
        keyboard: Keyboard,
        line: Arc<EventFd>,
        resets: Arc<AtomicU32>,
    }

    impl Bench {
        fn new() -> Self {
            let line = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
            let resets = Arc::new(AtomicU32::new(0));
            let count = Arc::clone(&resets);
            let reset = move || {
                count.fetch_add(1, Ordering::Relaxed);
            };
            let keyboard = Keyboard::new(Arc::clone(&line) as Arc<dyn Line>, reset);
            Self { keyboard, line, resets }
        }

        fn command(&mut self, command: u8, parameters: &[u8]) {
            self.keyboard.write(COMMAND, &[command]);
            parameters.iter().for_each(|byte| self.keyboard.write(DATA, &[*byte]));
        }

        fn status(&mut self) -> u8 {
            let mut byte = [0];
            self.keyboard.read(COMMAND, &mut byte);
            byte[0]
        }

        /// What a driver reads at one interrupt after the other; how many there were is left in the line.
        fn drain(&mut self) -> Vec<u8> {
            let mut bytes = Vec::new();
            while self.status() & OUTPUT_FULL != 0 {
                let mut byte = [0];
                self.keyboard.read(DATA, &mut byte);
                bytes.push(byte[0]);
            }
            bytes
        }
    }

    /// What Linux does to find a controller and a keyboard (drivers/input/serio/i8042.c, keyboard/atkbd.c).
    #[test]
    fn a_driver_finds_a_keyboard_and_no_mouse() {
        let mut bench = Bench::new();
        assert_eq!((bench.drain().len(), bench.status()), (0, SYSTEM | UNLOCKED));
        bench.command(0xaa, &[]);
        assert_eq!(bench.drain(), [TEST_PASSED]);
        bench.command(0x20, &[]);
        assert_eq!(bench.drain(), [SYSTEM | MOUSE_DISABLED | TRANSLATE]);
        // The mouse's loop answers at the keyboard's side, which means that there is none; its test says so again.
        bench.command(0xd3, &[0x5a]);
        bench.command(0xa9, &[]);
        assert_eq!(bench.drain(), [NO_MOUSE]);
        bench.command(0x60, &[TRANSLATE | INTERRUPT]);
        bench.keyboard.write(DATA, &[0xf2]);
        assert_eq!(bench.drain(), [ACKNOWLEDGE, 0xab, 0x83]);
        assert_eq!(bench.line.read().unwrap(), 3, "one interrupt for each byte");
        for bytes in [[0xed, 0], [0xf3, 0x20]] {
            bytes.iter().for_each(|byte| bench.keyboard.write(DATA, &[*byte]));
            assert_eq!(bench.drain(), [ACKNOWLEDGE; 2]);
        }
    }

    #[test]
    fn a_press_reaches_who_listens_and_nobody_else() {
        let mut bench = Bench::new();
        assert!(!bench.keyboard.press(), "nobody has asked for interrupts");
        bench.command(0x60, &[TRANSLATE | INTERRUPT | DISABLED]);
        assert!(!bench.keyboard.press(), "it is disabled");
        assert!(bench.drain().is_empty());
        bench.command(0x60, &[TRANSLATE | INTERRUPT]);
        assert!(bench.keyboard.press() && bench.keyboard.press());
        assert_eq!(bench.drain(), PRESS_TRANSLATED, "twice before it was read is once");
        assert_eq!(bench.line.read().unwrap(), 8);
        bench.command(0x60, &[INTERRUPT]);
        assert!(bench.keyboard.press());
        assert_eq!(bench.drain(), PRESS);
        assert_eq!(bench.resets.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_was_not_read_travels() {
        let mut bench = Bench::new();
        bench.command(0x60, &[TRANSLATE | INTERRUPT]);
        assert!(bench.keyboard.press());
        bench.keyboard.read(DATA, &mut [0]);
        let saved = bench.keyboard.save().unwrap();
        let mut there = Bench::new();
        there.keyboard.restore(&saved).unwrap();
        assert_eq!(there.drain(), PRESS_TRANSLATED[1..]);

        let mut state: KeyboardStateV1 = state::decode(&slot(), &saved).unwrap();
        state.queue = vec![0; QUEUE_MAX + 1].into();
        let refused = there.keyboard.restore(&state::encode(slot(), &state).unwrap());
        assert!(matches!(refused, Err(StateError::Unfit { .. })));
    }

    #[test]
    fn only_the_reset_commands_reset_and_no_input_grows_the_queue() {
        let mut bench = Bench::new();
        let resets = Arc::clone(&bench.resets);
        bench.command(0xd1, &[0xff]);
        bench.keyboard.write(DATA, &[0xfe]);
        bench.keyboard.write(COMMAND, &[0xfe, 0]);
        bench.keyboard.write(1, &[0xfe]);
        (0..100).for_each(|_| bench.keyboard.write(DATA, &[0xff]));
        assert_eq!(resets.load(Ordering::Relaxed), 0);
        assert!(bench.drain().len() <= QUEUE_MAX + 1);
        bench.command(0xfe, &[]);
        bench.command(0xd1, &[0xfe]);
        assert_eq!(resets.load(Ordering::Relaxed), 2);
    }
}
