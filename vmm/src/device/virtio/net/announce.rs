//! Frames that tell a network where a guest is, and what is learned for them from the guest's own frames.
//!
//! After a migration every switch on the way still sends frames for the guest to its old port, until a frame of the guest
//! passes by. A RARP request with the guest's MAC address as its source (as other hypervisors send it) teaches them without
//! any knowledge of addresses; a gratuitous ARP (RFC 5227, section 2.3) for each IPv4 address that the guest has used also
//! refreshes the neighbours' tables.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{HEADER_BYTES, Tap};

/// When the announcement is sent: a frame or two may be lost while bridges and taps settle.
pub const TIMES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(150)];

/// How many addresses of a guest are kept.
const ADDRESSES_MAX: usize = 4;

const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const REVERSE_REQUEST: u16 = 3;
/// Ethernet header and an ARP packet for IPv4.
pub const ARP_BYTES: usize = 14 + 28;
/// The shortest frame on a wire, without its checksum.
const FRAME_BYTES_MIN: usize = 60;

/// An announcement with the virtio header that a tap wants.
pub type Frame = [u8; HEADER_BYTES + FRAME_BYTES_MIN];

/// The IPv4 addresses that a guest was seen to use, the latest last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses(Vec<[u8; 4]>);

impl Addresses {
    /// As they were saved.
    pub fn from_saved(saved: &[[u8; 4]]) -> Self {
        Self(saved.iter().copied().take(ADDRESSES_MAX).filter(|address| is_host(*address)).collect())
    }

    /// To be saved.
    pub fn saved(&self) -> Vec<[u8; 4]> {
        self.0.clone()
    }

    /// Learns from a frame that the guest sends. Only ARP counts: there the sender speaks of itself, while the source of
    /// an IP packet may be somebody for whom the guest routes.
    pub fn learn(&mut self, mac: [u8; 6], frame: &[u8]) {
        let Some(frame) = frame.get(..ARP_BYTES) else { return };
        let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        let kind = (word(12), word(14), word(16), word(18));
        if kind != (ETHERTYPE_ARP, 1, 0x0800, 0x0604) || !matches!(word(20), ARP_REQUEST | ARP_REPLY) {
            return;
        }
        let address = [frame[28], frame[29], frame[30], frame[31]];
        if frame[6..12] != mac || frame[22..28] != mac || !is_host(address) {
            return;
        }
        if self.0.last() != Some(&address) {
            self.0.retain(|known| *known != address);
            if self.0.len() == ADDRESSES_MAX {
                self.0.remove(0);
            }
            self.0.push(address);
        }
    }

    /// The frames of one announcement.
    pub fn frames(&self, mac: [u8; 6]) -> Vec<Frame> {
        let mut frames = vec![frame(mac, ETHERTYPE_RARP, REVERSE_REQUEST, [0; 4], mac)];
        frames.extend(self.0.iter().map(|&address| frame(mac, ETHERTYPE_ARP, ARP_REQUEST, address, [0; 6])));
        frames
    }
}

/// What the card's thread learns and whoever asks for an announcement uses.
#[derive(Debug, Default)]
pub struct Announcer(Mutex<Addresses>);

impl Announcer {
    /// As it was saved.
    pub fn new(addresses: Addresses) -> Self {
        Self(Mutex::new(addresses))
    }

    fn addresses(&self) -> MutexGuard<'_, Addresses> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Addresses::learn`].
    pub fn learn(&self, mac: [u8; 6], frame: &[u8]) {
        self.addresses().learn(mac, frame);
    }

    /// See [`Addresses::saved`].
    pub fn saved(&self) -> Vec<[u8; 4]> {
        self.addresses().saved()
    }

    /// Sends the frames of one announcement.
    pub fn announce(&self, tap: &Tap) {
        let frames = self.addresses().frames(tap.mac());
        for mut frame in frames {
            let part = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
            // SAFETY: the part is the frame.
            if let Err(error) = unsafe { tap.write(&[part]) } {
                tracing::warn!(network = tap.id(), %error, "cannot announce the guest through the tap");
            }
        }
    }
}

/// An address that one host can have.
fn is_host(address: [u8; 4]) -> bool {
    address[0] != 0 && address[0] != 127 && address[0] < 224
}

/// A broadcast (R)ARP frame in which `mac` speaks of itself.
fn frame(mac: [u8; 6], ethertype: u16, operation: u16, address: [u8; 4], target: [u8; 6]) -> Frame {
    let mut frame = [0; HEADER_BYTES + FRAME_BYTES_MIN];
    let mut at = HEADER_BYTES;
    let mut put = |bytes: &[u8]| {
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&BROADCAST);
    put(&mac);
    put(&ethertype.to_be_bytes());
    put(&[0, 1, 8, 0, 6, 4]);
    put(&operation.to_be_bytes());
    put(&mac);
    put(&address);
    put(&target);
    put(&address);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 5];

    #[test]
    fn learns_from_its_own_arp_alone() {
        let mut addresses = Addresses::default();
        let own = |address| frame(MAC, ETHERTYPE_ARP, ARP_REQUEST, address, [0; 6]);
        addresses.learn(MAC, &own([10, 0, 0, 2])[HEADER_BYTES..]);
        // A probe, a multicast address, somebody else, a cut frame, a reverse request.
        addresses.learn(MAC, &own([0, 0, 0, 0])[HEADER_BYTES..]);
        addresses.learn(MAC, &own([224, 0, 0, 1])[HEADER_BYTES..]);
        addresses.learn([2, 0, 0, 0, 0, 6], &own([10, 0, 0, 3])[HEADER_BYTES..]);
        addresses.learn(MAC, &own([10, 0, 0, 3])[HEADER_BYTES..HEADER_BYTES + 41]);
        addresses.learn(MAC, &frame(MAC, ETHERTYPE_RARP, REVERSE_REQUEST, [10, 0, 0, 3], MAC)[HEADER_BYTES..]);
        assert_eq!(addresses.saved(), [[10, 0, 0, 2]]);
        for last in [2, 3, 4, 5, 6, 3] {
            addresses.learn(MAC, &own([10, 0, 0, last])[HEADER_BYTES..]);
        }
        assert_eq!(addresses.saved(), [[10, 0, 0, 4], [10, 0, 0, 5], [10, 0, 0, 6], [10, 0, 0, 3]]);
        assert_eq!(Addresses::from_saved(&addresses.saved()), addresses);
        assert_eq!(addresses.frames(MAC).len(), 5);
    }
}
