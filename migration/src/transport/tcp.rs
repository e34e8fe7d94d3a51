//! TCP connections and how they are set up.

use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::TransportError;

/// How often a thread that waits on a socket looks whether it should stop.
pub const TICK: Duration = Duration::from_millis(50);

/// Connects within `timeout`.
///
/// # Errors
///
/// [`TransportError::Connect`].
pub fn connect(address: SocketAddr, timeout: Duration) -> Result<TcpStream, TransportError> {
    let stream = TcpStream::connect_timeout(&address, timeout)
        .and_then(|stream| configure(&stream).map(|()| stream))
        .map_err(|source| TransportError::Connect { address, source })?;
    Ok(stream)
}

/// Sets up a connection: writes leave at once (batching is ours), blocked calls return every [`TICK`]. Buffer sizes are
/// left to the kernel: a fixed one would end its own tuning, and is cut to `net.core.wmem_max`, which is mostly small.
///
/// # Errors
///
/// What the kernel says.
pub fn configure(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TICK))?;
    stream.set_write_timeout(Some(TICK))?;
    Ok(())
}

/// Waits until `deadline` for a connection; `None` if there was none, or if `stop` said so.
///
/// # Errors
///
/// What the kernel says about the listener itself; a connection that died before it was taken is skipped.
pub fn accept(
    listener: &TcpListener,
    deadline: Instant,
    stop: impl Fn() -> bool,
) -> io::Result<Option<(TcpStream, SocketAddr)>> {
    listener.set_nonblocking(true)?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || stop() {
            return Ok(None);
        }
        let wait = PollTimeout::try_from(left.min(TICK).as_millis().max(1) as u32).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], wait) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        match listener.accept() {
            Ok((stream, peer)) => match configure(&stream) {
                Ok(()) => return Ok(Some((stream, peer))),
                Err(error) => tracing::debug!(%peer, %error, "connection died before it was taken"),
            },
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Lets what was sent last (an alert, a reason) reach a peer that may still be sending: without this, bytes that were not
/// read would make the kernel send a reset, which overtakes it.
pub fn linger(mut stream: &TcpStream, at_most: Duration) {
    let _ = stream.shutdown(Shutdown::Write);
    let end = Instant::now() + at_most;
    let mut waste = [0; 4096];
    while Instant::now() < end {
        match stream.read(&mut waste) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if is_tick(&error) => {}
            Err(_) => return,
        }
    }
}

/// Whether a call came back only because its [`TICK`] was over.
pub fn is_tick(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}
