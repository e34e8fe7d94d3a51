//! A tap: the host's end of a network card.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::net::if_::if_nametoindex;

use super::{HEADER_BYTES, feature};
use crate::config::{NetworkConfig, TapSource};

const TUN: &str = "/dev/net/tun";
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// A tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The MAC address is none that a card can have.
    #[error(
        "network {network}: {mac} is not a unicast MAC address; write six bytes like 02:00:00:00:00:05, the first one even"
    )]
    Mac {
        /// The card's name.
        network: String,
        /// What was configured.
        mac: String,
    },
    /// The kernel has no taps here.
    #[error(
        "network {network}: cannot open {TUN}: load the module (modprobe tun), or give this user the right to open it"
    )]
    NoTun {
        /// The card's name.
        network: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// There is no such interface.
    #[error(
        "network {network}: there is no tap {tap} in this network namespace: create it with ip tuntap add {tap} mode tap"
    )]
    Missing {
        /// The card's name.
        network: String,
        /// Name of the interface.
        tap: String,
    },
    /// Another process uses it.
    #[error(
        "network {network}: tap {tap} is in use by another process: stop the machine that has it, or use another tap"
    )]
    Busy {
        /// The card's name.
        network: String,
        /// Name of the interface.
        tap: String,
    },
    /// It belongs to another user.
    #[error(
        "network {network}: not permitted to use tap {tap}: create it for this user (ip tuntap add {tap} mode tap user USER), or run with CAP_NET_ADMIN"
    )]
    Permission {
        /// The card's name.
        network: String,
        /// Name of the interface.
        tap: String,
    },
    /// It is an interface of another kind.
    #[error("network {network}: {tap} is not a tap with one queue: create it with ip tuntap add {tap} mode tap")]
    Kind {
        /// The card's name.
        network: String,
        /// Name of the interface.
        tap: String,
    },
    /// The inherited descriptor is unusable.
    #[error(
        "network {network}: file descriptor {fd} is not an open tap with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR: the parent process must attach it so and leave it open"
    )]
    Descriptor {
        /// The card's name.
        network: String,
        /// Its number.
        fd: i32,
    },
    /// Anything else.
    #[error("network {network}: cannot {action} of tap {tap}")]
    Io {
        /// The card's name.
        network: String,
        /// Name or number.
        tap: String,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// An open tap and the name and MAC address of the card that it serves.
#[derive(Debug)]
pub struct Tap {
    file: File,
    id: String,
    mac: [u8; 6],
}

impl Tap {
    /// Opens the tap of a card.
    ///
    /// # Errors
    ///
    /// [`TapError`] if it is missing, in use, of the wrong kind, or not permitted.
    pub fn open(config: &NetworkConfig) -> Result<Self, TapError> {
        let network = config.id.clone();
        let mac = parse_mac(&config.mac)
            .ok_or_else(|| TapError::Mac { network: network.clone(), mac: config.mac.clone() })?;
        let (file, tap) = match &config.source {
            TapSource::Tap(name) => (attach(&network, name)?, name.clone()),
            TapSource::Fd(fd) => (inherit(&network, *fd)?, format!("file descriptor {fd}")),
        };
        let failed = |action, source| TapError::Io { network: network.clone(), tap: tap.clone(), action, source };
        let header = HEADER_BYTES as libc::c_int;
        // SAFETY: the ioctl reads an int.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })
            .map_err(|source| failed("set the header length", source))?;
        let flags = fcntl(&file, FcntlArg::F_GETFL)
            .and_then(|flags| fcntl(&file, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK)))
            .map_err(io::Error::from);
        flags.map_err(|source| failed("change the blocking mode", source))?;
        let tap = Self { file, id: network.clone(), mac };
        tap.set_offloads(0).map_err(|source| failed("switch off the offloads", source))?;
        tap.close().map_err(|source| failed("filter the frames", source))?;
        Ok(tap)
    }

    /// From now on frames for the guest are dropped, and those that wait are: there is no driver yet, or the machine is
    /// still on its way here, and would otherwise be met by all that was broadcast meanwhile.
    pub fn close(&self) -> io::Result<()> {
        // A filter of one instruction: keep 0 bytes.
        let mut nothing = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
        let program = libc::sock_fprog { len: 1, filter: &raw mut nothing };
        // SAFETY: the kernel copies the program.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNATTACHFILTER, &raw const program) })?;
        let mut frame = [0u8; HEADER_BYTES + 1];
        let part = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
        // SAFETY: the part is the buffer above; a frame is cut to it.
        while unsafe { self.read(&[part]) }.is_ok() {}
        Ok(())
    }

    /// From now on frames wait for the guest.
    pub fn open_up(&self) -> io::Result<()> {
        let program = libc::sock_fprog { len: 0, filter: std::ptr::null_mut() };
        // SAFETY: the kernel does not look at the argument of this ioctl.
        let result = check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNDETACHFILTER, &raw const program) });
        // Without a filter there is nothing to do.
        result.or_else(|error| if error.raw_os_error() == Some(libc::ENOENT) { Ok(()) } else { Err(error) })
    }

    /// The card's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The card's MAC address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Lets the kernel hand over frames without checksums and longer than the MTU, as far as the driver has accepted
    /// (virtio feature bits).
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        let mut flags = 0;
        if features & feature::GUEST_CSUM != 0 {
            flags |= libc::TUN_F_CSUM;
            for (bit, flag) in [
                (feature::GUEST_TSO4, libc::TUN_F_TSO4),
                (feature::GUEST_TSO6, libc::TUN_F_TSO6),
                (feature::GUEST_ECN, libc::TUN_F_TSO_ECN),
            ] {
                flags |= if features & bit != 0 { flag } else { 0 };
            }
        }
        // SAFETY: the ioctl takes its argument by value.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    /// Reads one frame with its header into `parts`; returns its length, at most the room that there is.
    ///
    /// # Safety
    ///
    /// The parts are memory that may be written.
    pub unsafe fn read(&self, parts: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: as the caller promises.
        let result = unsafe { libc::readv(self.file.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Writes one frame with its header.
    ///
    /// # Safety
    ///
    /// The parts are memory that may be read.
    pub unsafe fn write(&self, parts: &[libc::iovec]) -> io::Result<()> {
        // SAFETY: as the caller promises.
        let result = unsafe { libc::writev(self.file.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn attach(network: &str, name: &str) -> Result<File, TapError> {
    let (id, tap) = (|| network.to_owned(), || name.to_owned());
    // TUNSETIFF would make an interface that does not exist, and the machine would run without a network.
    if name.len() >= libc::IFNAMSIZ || if_nametoindex(name).is_err() {
        return Err(TapError::Missing { network: id(), tap: tap() });
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)
        .map_err(|source| TapError::NoTun { network: id(), source })?;
    let mut request = interface_request();
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
    // SAFETY: the ioctl reads and writes the request.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }).map_err(
        |source| match source.raw_os_error() {
            Some(libc::EBUSY) => TapError::Busy { network: id(), tap: tap() },
            Some(libc::EPERM | libc::EACCES) => TapError::Permission { network: id(), tap: tap() },
            Some(libc::EINVAL) => TapError::Kind { network: id(), tap: tap() },
            _ => TapError::Io { network: id(), tap: tap(), action: "attach to the interface", source },
        },
    )?;
    Ok(file)
}

fn inherit(network: &str, fd: i32) -> Result<File, TapError> {
    let unusable = || TapError::Descriptor { network: network.to_owned(), fd };
    if fd < 0 {
        return Err(unusable());
    }
    // SAFETY: the borrow ends in this function. Should the number not be open, the calls below fail with EBADF.
    let inherited = unsafe { BorrowedFd::borrow_raw(fd) };
    let mut request = interface_request();
    // SAFETY: the ioctl writes the request; a descriptor of another kind does not know it.
    check(unsafe { libc::ioctl(fd, libc::TUNGETIFF, &raw mut request) }).map_err(|_| unusable())?;
    // SAFETY: TUNGETIFF has set the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    if flags & FLAGS != FLAGS {
        return Err(unusable());
    }
    Ok(File::from(inherited.try_clone_to_owned().map_err(|_| unusable())?))
}

fn interface_request() -> libc::ifreq {
    // SAFETY: the structure consists of integers and pointers, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

/// Six bytes in hexadecimal between colons, unicast and not all zero.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses() {
        assert_eq!(parse_mac("02:00:00:00:0a:Ff"), Some([2, 0, 0, 0, 10, 255]));
        for wrong in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:05:06",
            "01:00:00:00:00:05",
            "00:00:00:00:00:00",
            "+2:00:00:00:00:05",
            "2:0:0:0:0:5",
        ] {
            assert_eq!(parse_mac(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let config = |source| NetworkConfig { id: "net0".into(), source, mac: "02:00:00:00:00:05".into() };
        let missing = Tap::open(&config(TapSource::Tap("devices-none".into()))).unwrap_err();
        assert!(matches!(missing, TapError::Missing { .. }), "{missing}");
        let long = Tap::open(&config(TapSource::Tap("a-name-that-is-far-too-long".into()))).unwrap_err();
        assert!(matches!(long, TapError::Missing { .. }), "{long}");
        let file = File::open("/dev/null").unwrap();
        for fd in [file.as_raw_fd(), 987_654, -1] {
            let wrong = Tap::open(&config(TapSource::Fd(fd))).unwrap_err();
            assert!(matches!(wrong, TapError::Descriptor { .. }), "{wrong}");
        }
    }
}
