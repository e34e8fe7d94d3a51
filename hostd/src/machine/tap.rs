//! Tap devices: made here, attached to the bridge, and handed to the VMM as an open descriptor.
//!
//! They are not persistent: the kernel removes a tap when the last descriptor is closed, so none outlives its machine,
//! whatever happens to hostd.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// A tap cannot be made or attached.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// `/dev/net/tun` is missing or closed.
    #[error("cannot open /dev/net/tun: load the module `tun`, and run hostd with CAP_NET_ADMIN")]
    Open(#[source] io::Error),
    /// The kernel refused it.
    #[error("cannot make the tap `{tap}`: is one of that name there already, and has hostd CAP_NET_ADMIN?")]
    Create {
        /// Name.
        tap: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// It could not be attached.
    #[error(
        "cannot attach the tap `{tap}` to the bridge `{bridge}`: make the bridge (`ip link add {bridge} type bridge`), or correct `bridge` in the configuration"
    )]
    Bridge {
        /// Tap.
        tap: String,
        /// Bridge.
        bridge: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// It could not be switched on.
    #[error("cannot bring up the tap `{tap}`")]
    Up {
        /// Tap.
        tap: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// Makes the tap `name`, attaches it to `bridge` and brings it up; it lives as long as the descriptor.
///
/// # Errors
///
/// [`TapError`] names the tap and what to do; nothing is left behind.
pub fn create(name: &str, bridge: Option<&str>) -> Result<OwnedFd, TapError> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(TapError::Open)?;
    let created = |source| TapError::Create { tap: name.to_owned(), source };
    let mut request = request(name).map_err(created)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // The three flags fit into 15 bits.
    request.ifr_ifru.ifru_flags = flags as i16;
    control(&tun, libc::TUNSETIFF, &mut request).map_err(created)?;
    let socket = datagram_socket().map_err(created)?;
    if let Some(bridge) = bridge {
        attach(&socket, name, bridge).map_err(|source| TapError::Bridge {
            tap: name.to_owned(),
            bridge: bridge.to_owned(),
            source,
        })?;
    }
    bring_up(&socket, name).map_err(|source| TapError::Up { tap: name.to_owned(), source })?;
    Ok(tun.into())
}

fn attach(socket: &File, tap: &str, bridge: &str) -> io::Result<()> {
    let mut index = request(tap)?;
    control(socket, libc::SIOCGIFINDEX, &mut index)?;
    let mut join = request(bridge)?;
    // SAFETY: SIOCGIFINDEX has just filled `ifru_ifindex`, a plain integer.
    join.ifr_ifru.ifru_ifindex = unsafe { index.ifr_ifru.ifru_ifindex };
    control(socket, SIOCBRADDIF, &mut join)
}

/// Adds an interface to a bridge; not in libc (linux/sockios.h).
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

fn bring_up(socket: &File, name: &str) -> io::Result<()> {
    let mut flags = request(name)?;
    control(socket, libc::SIOCGIFFLAGS, &mut flags)?;
    // SAFETY: SIOCGIFFLAGS has just filled `ifru_flags`, a plain integer; IFF_UP (1) fits.
    unsafe { flags.ifr_ifru.ifru_flags |= libc::IFF_UP as i16 };
    control(socket, libc::SIOCSIFFLAGS, &mut flags)
}

fn datagram_socket() -> io::Result<File> {
    // SAFETY: no pointers; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and belongs to nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is a plain C structure for which all zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("`{name}` is not an interface name")));
    }
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = byte.cast_signed();
    }
    Ok(request)
}

fn control(file: &File, operation: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: all operations of this module take a pointer to an `ifreq` that outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), operation, std::ptr::from_mut(request)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
