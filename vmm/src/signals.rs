//! Waiting for the end of the process: SIGTERM, SIGINT, SIGHUP, a request, or the machine.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_sys_util::eventfd::EventFd;

/// The signals that end the process.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
}

impl Signals {
    /// Blocks them for this thread and all threads that it will start.
    ///
    /// # Errors
    ///
    /// If the kernel gives no signal descriptor.
    pub fn block() -> io::Result<Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block()?;
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { descriptor })
    }

    /// Returns when one arrives, when `quit` is written to, or when `machine` becomes readable.
    ///
    /// # Errors
    ///
    /// If the kernel refuses to wait.
    pub fn wait(&self, quit: &EventFd, machine: Option<RawFd>) -> io::Result<()> {
        let readable = |fd: RawFd| {
            // SAFETY: all three descriptors are open for as long as this call lasts: their owners are borrowed, or held
            // by the caller together with the machine.
            PollFd::new(unsafe { BorrowedFd::borrow_raw(fd) }, PollFlags::POLLIN)
        };
        let mut descriptors = vec![readable(self.descriptor.as_raw_fd()), readable(quit.as_raw_fd())];
        descriptors.extend(machine.map(readable));
        loop {
            match poll(&mut descriptors, PollTimeout::NONE) {
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(()),
            }
        }
    }
}
