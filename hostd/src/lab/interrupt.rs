//! Ctrl-C, SIGTERM and SIGHUP as a flag that every wait looks at, so that cleaning up is an ordinary return.
//!
//! The handler only stores a flag and writes to a pipe. Whoever waits does it in [`wait_until`], [`poll`] or with [`check`] between two
//! steps, gets [`LabError::Interrupted`] and unwinds; the lab's `Drop` removes what was made.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::error::{LabError, LabResult};

static RAISED: AtomicBool = AtomicBool::new(false);
static WAKE: AtomicI32 = AtomicI32::new(-1);
static PIPE: OnceLock<(UnixStream, UnixStream)> = OnceLock::new();

extern "C" fn on_signal(_: i32) {
    RAISED.store(true, Ordering::SeqCst);
    let fd = WAKE.load(Ordering::SeqCst);
    if fd >= 0 {
        // SAFETY: write(2) is async-signal-safe; the descriptor is never closed once it is stored, the byte is static.
        unsafe { libc::write(fd, b"!".as_ptr().cast(), 1) };
    }
}

/// Takes over Ctrl-C, SIGTERM and SIGHUP for this process. May be called more than once.
///
/// # Errors
/// When the kernel refuses a pipe or a handler.
pub fn install() -> LabResult<()> {
    let fail = |source| LabError::Io { action: "install a signal handler for", path: "SIGINT".into(), source };
    if PIPE.get().is_none() {
        let pair = UnixStream::pair().map_err(fail)?;
        pair.0.set_nonblocking(true).map_err(fail)?;
        let pair = PIPE.get_or_init(|| pair);
        WAKE.store(pair.0.as_raw_fd(), Ordering::SeqCst);
    }
    let action = SigAction::new(SigHandler::Handler(on_signal), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only uses atomics and write(2), both async-signal-safe.
        unsafe { sigaction(signal, &action) }.map_err(|errno| fail(errno.into()))?;
    }
    Ok(())
}

/// Whether the process was asked to end.
pub fn raised() -> bool {
    RAISED.load(Ordering::SeqCst)
}

/// As if Ctrl-C had been pressed; for tests and for threads that found a reason to end.
pub fn raise() {
    RAISED.store(true, Ordering::SeqCst);
    if let Some((writer, _)) = PIPE.get() {
        // A full pipe has woken everybody already.
        let _ = (&*writer).write(b"!");
    }
}

/// An error once the process was asked to end.
///
/// # Errors
/// [`LabError::Interrupted`].
pub fn check() -> LabResult<()> {
    if raised() { Err(LabError::Interrupted) } else { Ok(()) }
}

/// Readable once the process was asked to end; it stays readable. `None` before [`install`].
pub fn descriptor() -> Option<BorrowedFd<'static>> {
    PIPE.get().map(|(_, reader)| reader.as_fd())
}

/// Waits for a moment, or until interrupted.
///
/// # Errors
/// [`LabError::Interrupted`].
pub fn wait_until(moment: Instant) -> LabResult<()> {
    loop {
        check()?;
        let Some(left) = moment.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
            return Ok(());
        };
        let timeout =
            PollTimeout::try_from(left.min(Duration::from_secs(60)).as_millis().max(1)).unwrap_or(PollTimeout::MAX);
        match descriptor() {
            Some(fd) => drop(nix::poll::poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout)),
            None => std::thread::sleep(left),
        }
    }
}

/// Asks again and again, every `interval`, until `probe` has an answer: for things the kernel has no event for.
///
/// # Errors
/// [`LabError::Deadline`] after `deadline`, [`LabError::Interrupted`], and whatever `probe` fails with.
pub fn poll<T>(
    what: &str,
    deadline: Duration,
    interval: Duration,
    mut probe: impl FnMut() -> LabResult<Option<T>>,
) -> LabResult<T> {
    let start = Instant::now();
    loop {
        check()?;
        if let Some(answer) = probe()? {
            return Ok(answer);
        }
        if start.elapsed() >= deadline {
            return Err(LabError::Deadline { what: what.to_owned(), waited: deadline });
        }
        wait_until(Instant::now() + interval.min(deadline))?;
    }
}
