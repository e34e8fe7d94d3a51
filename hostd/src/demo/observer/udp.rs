//! UDP echo requests with kernel time stamps.

use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};

use super::series::Series;
use super::{Clock, ECHO_PORT};

/// Bytes in a request.
const REQUEST_BYTES: usize = 64;

/// Begins every request, so that a stray datagram is not taken for a reply.
const MAGIC: [u8; 8] = *b"headroom";

pub(super) struct UdpProbe {
    socket: UdpSocket,
    clock: Clock,
}

impl UdpProbe {
    pub(super) fn new(address: Ipv4Addr, clock: Clock) -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((address, ECHO_PORT))?;
        socket.set_nonblocking(true)?;
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
        Ok(Self { socket, clock })
    }

    /// Sends one request. One that the network refuses (no neighbour, port closed) is a request without a reply.
    pub(super) fn send(&self, series: &mut Series) {
        let sequence = series.send(self.clock.now());
        let mut request = [0u8; REQUEST_BYTES];
        request[..8].copy_from_slice(&MAGIC);
        request[8..16].copy_from_slice(&sequence.to_le_bytes());
        // An error of an earlier request is reported by the next send: that one was not sent then.
        if self.socket.send(&request).is_err() {
            let _ = self.socket.send(&request);
        }
    }

    /// Takes all replies that have arrived.
    pub(super) fn receive(&self, series: &mut Series) {
        let mut reply = [0u8; 256];
        // Bounded, so that a flood cannot keep the requests from being sent.
        for _ in 0..1024 {
            match self.receive_one(&mut reply) {
                Ok((length, at)) => match sequence(&reply[..length]) {
                    Some(sequence) => series.arrive(sequence, at),
                    None => series.stranger(),
                },
                Err(nix::errno::Errno::EAGAIN) => return,
                // For example "connection refused": the error belongs to a request, and is cleared now.
                Err(_) => {}
            }
        }
    }

    fn receive_one(&self, buffer: &mut [u8]) -> nix::Result<(usize, u64)> {
        let mut slices = [IoSliceMut::new(buffer)];
        let mut space = nix::cmsg_space!(libc::timespec);
        let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_DONTWAIT)?;
        let stamp = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::ScmTimestampns(stamp) => Some(stamp.num_nanoseconds()),
            _ => None,
        });
        let (now, wall) = (self.clock.now(), clock_gettime(ClockId::CLOCK_REALTIME)?.num_nanoseconds());
        // The kernel stamps by the wall clock. Only the short way back from now is taken from it.
        let age = stamp.map_or(0, |stamp| u64::try_from(wall - stamp).unwrap_or(0));
        Ok((message.bytes, now.saturating_sub(age)))
    }
}

impl AsFd for UdpProbe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn sequence(reply: &[u8]) -> Option<u64> {
    if reply.len() != REQUEST_BYTES || reply[..8] != MAGIC || reply[16..].iter().any(|byte| *byte != 0) {
        return None;
    }
    reply[8..16].try_into().ok().map(u64::from_le_bytes)
}
