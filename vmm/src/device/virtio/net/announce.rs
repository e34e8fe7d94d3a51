//! Frames that tell a network where a guest is, and what is learned for them from the guest's own frames.
//!
//! After a migration every switch on the way still sends frames for the guest to its old port, until a frame of the guest
//! passes by. A RARP request with the guest's MAC address as its source (as other hypervisors send it) teaches them without
//! any knowledge of addresses; a gratuitous ARP (RFC 5227, section 2.3) for each IPv4 address that the guest has used, and an
//! unsolicited neighbour advertisement (RFC 4861, section 7.2.6) for each IPv6 address, also refresh the neighbours' tables.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{HEADER_BYTES, Tap};

/// When the announcement is sent: a frame or two may be lost while bridges and taps settle.
pub const TIMES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(150)];

/// How many addresses of a guest are kept.
const ADDRESSES_MAX: usize = 8;

const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const REVERSE_REQUEST: u16 = 3;
/// Ethernet header and an ARP packet for IPv4.
const ARP_BYTES: usize = 14 + 28;
/// The shortest frame on a wire, without its checksum.
const FRAME_BYTES_MIN: usize = 60;

/// Neighbour discovery (RFC 4861, sections 4.3, 4.4 and 4.6.1).
mod neighbour {
    pub const ICMPV6: u8 = 58;
    /// Nothing that a router has passed on.
    pub const HOPS: u8 = 255;
    pub const SOLICITATION: u8 = 135;
    pub const ADVERTISEMENT: u8 = 136;
    pub const SOURCE_OPTION: u8 = 1;
    pub const TARGET_OPTION: u8 = 2;
    /// What others remember is to be replaced.
    pub const OVERRIDE: u8 = 0x20;
    /// The message with one option.
    pub const BYTES: usize = 32;
    /// Where it begins: behind the headers of Ethernet and IPv6.
    pub const AT: usize = 14 + 40;
}

/// All that is looked at of a frame.
pub const LEARNED_BYTES: usize = neighbour::AT + neighbour::BYTES;

/// An announcement with the virtio header that a tap wants.
pub type Frame = Vec<u8>;

/// The addresses that a guest was seen to use, the latest last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses(Vec<IpAddr>);

impl Addresses {
    /// As they were saved.
    pub fn from_saved(saved: &[IpAddr]) -> Self {
        Self(saved.iter().copied().take(ADDRESSES_MAX).filter(|address| is_host(*address)).collect())
    }

    /// To be saved.
    pub fn saved(&self) -> Vec<IpAddr> {
        self.0.clone()
    }

    /// Learns from a frame that the guest sends. Only ARP and neighbour discovery count: there the sender speaks of itself, while
    /// the source of any other packet may be somebody for whom the guest routes.
    pub fn learn(&mut self, mac: [u8; 6], frame: &[u8]) {
        let from_arp = || Some(IpAddr::from(by_arp(mac, frame.first_chunk()?)?));
        let from_neighbour = || Some(IpAddr::from(by_neighbour(mac, frame.first_chunk()?)?));
        let Some(address) = from_arp().or_else(from_neighbour).filter(|&address| is_host(address)) else { return };
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
        let mut frames = vec![arp(mac, ETHERTYPE_RARP, REVERSE_REQUEST, [0; 4], mac)];
        frames.extend(self.0.iter().map(|address| match address {
            IpAddr::V4(address) => arp(mac, ETHERTYPE_ARP, ARP_REQUEST, address.octets(), [0; 6]),
            IpAddr::V6(address) => advertisement(mac, *address),
        }));
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
    pub fn saved(&self) -> Vec<IpAddr> {
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
fn is_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let [first, ..] = address.octets();
            first != 0 && first != 127 && first < 224
        }
        IpAddr::V6(address) => !address.is_unspecified() && !address.is_loopback() && !address.is_multicast(),
    }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Of whom an ARP packet speaks that `mac` sends of itself.
fn by_arp(mac: [u8; 6], frame: &[u8; ARP_BYTES]) -> Option<Ipv4Addr> {
    let kind = (word(frame, 12), word(frame, 14), word(frame, 16), word(frame, 18));
    let known = kind == (ETHERTYPE_ARP, 1, 0x0800, 0x0604) && matches!(word(frame, 20), ARP_REQUEST | ARP_REPLY);
    let own = frame[6..12] == mac && frame[22..28] == mac;
    (known && own).then(|| Ipv4Addr::new(frame[28], frame[29], frame[30], frame[31]))
}

/// The same of neighbour discovery: who asks tells its address in the header, who advertises tells the one that it is asked for. Both
/// add their MAC address, but for who only asks whether an address is free.
fn by_neighbour(mac: [u8; 6], frame: &[u8; LEARNED_BYTES]) -> Option<Ipv6Addr> {
    let (packet, message) = frame.split_at(neighbour::AT);
    let known = word(packet, 12) == ETHERTYPE_IPV6 && packet[20..22] == [neighbour::ICMPV6, neighbour::HOPS];
    let (option, address) = match message[0] {
        neighbour::SOLICITATION => (neighbour::SOURCE_OPTION, &packet[22..38]),
        neighbour::ADVERTISEMENT => (neighbour::TARGET_OPTION, &message[8..24]),
        _ => return None,
    };
    let own = packet[6..12] == mac && message[24..26] == [option, 1] && message[26..32] == mac;
    (known && own).then(|| address.first_chunk::<16>().map(|&octets| Ipv6Addr::from(octets))).flatten()
}

/// A broadcast (R)ARP frame in which `mac` speaks of itself.
fn arp(mac: [u8; 6], ethertype: u16, operation: u16, address: [u8; 4], target: [u8; 6]) -> Frame {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend(BROADCAST);
    frame.extend(mac);
    frame.extend(ethertype.to_be_bytes());
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac);
    frame.extend(address);
    frame.extend(target);
    frame.extend(address);
    frame.resize(HEADER_BYTES + FRAME_BYTES_MIN, 0);
    frame
}

/// An unsolicited neighbour advertisement to all nodes.
fn advertisement(mac: [u8; 6], address: Ipv6Addr) -> Frame {
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut message = vec![neighbour::ADVERTISEMENT, 0, 0, 0, neighbour::OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    message.extend([neighbour::TARGET_OPTION, 1]);
    message.extend(mac);
    let sum = checksum(address, ALL_NODES, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut frame = vec![0; HEADER_BYTES];
    frame.extend([0x33, 0x33, 0, 0, 0, 1]);
    frame.extend(mac);
    frame.extend(ETHERTYPE_IPV6.to_be_bytes());
    frame.extend([0x60, 0, 0, 0, 0, neighbour::BYTES as u8, neighbour::ICMPV6, neighbour::HOPS]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

/// The checksum of an ICMPv6 message in which its own field is zero (RFC 8200, section 8.1).
fn checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let words = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|&pair| u32::from(u16::from_be_bytes(pair))).sum::<u32>();
    let header = message.len() as u32 + u32::from(neighbour::ICMPV6);
    let sum = words(&source.octets()) + words(&destination.octets()) + header + words(message);
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 5];

    #[test]
    fn learns_from_its_own_arp_alone() {
        let mut addresses = Addresses::default();
        let own = |address| arp(MAC, ETHERTYPE_ARP, ARP_REQUEST, address, [0; 6]);
        addresses.learn(MAC, &own([10, 0, 0, 2])[HEADER_BYTES..]);
        // A probe, a multicast address, somebody else, a cut frame, a reverse request.
        addresses.learn(MAC, &own([0, 0, 0, 0])[HEADER_BYTES..]);
        addresses.learn(MAC, &own([224, 0, 0, 1])[HEADER_BYTES..]);
        addresses.learn([2, 0, 0, 0, 0, 6], &own([10, 0, 0, 3])[HEADER_BYTES..]);
        addresses.learn(MAC, &own([10, 0, 0, 3])[HEADER_BYTES..HEADER_BYTES + 41]);
        addresses.learn(MAC, &arp(MAC, ETHERTYPE_RARP, REVERSE_REQUEST, [10, 0, 0, 3], MAC)[HEADER_BYTES..]);
        assert_eq!(addresses.saved(), [IpAddr::from([10, 0, 0, 2])]);
        for last in [2, 3, 4, 5, 6, 7, 8, 9, 10, 3] {
            addresses.learn(MAC, &own([10, 0, 0, last])[HEADER_BYTES..]);
        }
        let expected = [4, 5, 6, 7, 8, 9, 10, 3].map(|last| IpAddr::from([10, 0, 0, last]));
        assert_eq!(addresses.saved(), expected);
        assert_eq!(Addresses::from_saved(&addresses.saved()), addresses);
        assert_eq!(addresses.frames(MAC).len(), 9);
    }

    #[test]
    fn learns_from_its_own_neighbour_discovery_alone() {
        let address: Ipv6Addr = "fd00::5".parse().unwrap();
        let learned = |frame: &[u8]| {
            let mut addresses = Addresses::default();
            addresses.learn(MAC, frame);
            addresses.saved()
        };
        let advertised = advertisement(MAC, address).split_off(HEADER_BYTES);
        assert_eq!(advertised.len(), LEARNED_BYTES);
        assert_eq!(learned(&advertised), [IpAddr::from(address)]);
        // Who solicits speaks of its source, with another option.
        let mut solicited = advertised.clone();
        (solicited[54], solicited[78]) = (neighbour::SOLICITATION, neighbour::SOURCE_OPTION);
        solicited[62..78].fill(9);
        assert_eq!(learned(&solicited), [IpAddr::from(address)]);
        solicited[22..38].fill(0);
        assert!(learned(&solicited).is_empty(), "it asks whether an address is free");
        for (at, wrong) in [(6, 4), (12, 8), (20, 17), (21, 64), (54, 134), (78, 1), (79, 2), (85, 6), (62, 0xff)] {
            let mut other = advertised.clone();
            other[at] = wrong;
            assert!(learned(&other).is_empty(), "byte {at}");
        }
        assert!(learned(&advertised[..LEARNED_BYTES - 1]).is_empty());
        assert!(learned(&advertisement(MAC, Ipv6Addr::LOCALHOST)[HEADER_BYTES..]).is_empty());
    }

    /// Summed with its checksum, a message and its pseudo-header give all ones.
    #[test]
    fn checksums_are_right() {
        for address in ["fe80::5", "fd00::5", "2001:db8:ffff:ffff:ffff:ffff:ffff:fffe"] {
            let frame = advertisement(MAC, address.parse().unwrap()).split_off(HEADER_BYTES);
            let words = frame[22..].as_chunks().0.iter().map(|&pair| u32::from(u16::from_be_bytes(pair)));
            let mut sum = words.sum::<u32>() + u32::from(word(&frame, 18)) + 58;
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            assert_eq!(sum, 0xffff, "{address}");
        }
    }
}
