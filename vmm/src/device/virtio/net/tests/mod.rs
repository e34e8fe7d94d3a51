//! A driver against the real card: a real tap in a network namespace of the test's own, with a packet socket at the
//! network's side.

mod control;
mod neighbours;
mod offload;

use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use migration::guest::StatePayload;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};

use super::{BATCH, Net, QUEUE_SIZE, QUEUES, Tap, TapError, feature};
use crate::config::{NetworkConfig, TapSource};
use crate::device::virtio::feature as common;
use crate::device::virtio::testing::{Board, DATA, Driver, DriverQueue};
use crate::device::{Device, DeviceError, StateError};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 5];
const RX: usize = 0;
const TX: usize = 1;
const BUFFER_BYTES: u64 = 0x800;
const TX_BUFFER: u64 = DATA + 0x80_0000;
const BASIC: u64 = common::COMMON | feature::MAC | feature::STATUS;

/// Runs a test in a thread with a network namespace of its own.
fn in_namespace(test: fn()) {
    std::thread::spawn(move || {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            println!("skipped: a network namespace needs root: {error}");
            return;
        }
        test();
    })
    .join()
    .unwrap();
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn config(name: &str) -> NetworkConfig {
    NetworkConfig { id: "net0".into(), source: TapSource::Tap(name.into()), mac: "02:00:00:00:00:05".into() }
}

/// Opens a tap that was just closed. Other tests of this process start programs, and a child has a copy of every descriptor from its
/// fork until its exec: for so long the interface stays busy.
fn open_again(config: &NetworkConfig) -> Tap {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match Tap::open(config) {
            Err(TapError::Busy { .. }) if Instant::now() < end => std::thread::yield_now(),
            opened => return opened.unwrap(),
        }
    }
}

/// A packet socket on an interface: the network's side of the tap.
struct Wire(OwnedFd);

impl Wire {
    fn new(name: &str) -> Self {
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: plain system calls on a structure of integers.
        unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol));
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = if_nametoindex(name).unwrap() as i32;
            let length = size_of::<libc::sockaddr_ll>() as u32;
            assert_eq!(libc::bind(fd, (&raw const address).cast(), length), 0);
            Self(OwnedFd::from_raw_fd(fd))
        }
    }

    fn send(&self, frame: &[u8]) {
        // SAFETY: the frame is readable.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(sent, frame.len() as isize, "{}", io::Error::last_os_error());
    }

    /// The next frame that came out of the tap; the socket also sees what goes into it.
    fn receive(&self, patience: Duration) -> Option<Vec<u8>> {
        let end = Instant::now() + patience;
        loop {
            let left = end.checked_duration_since(Instant::now())?;
            let time = libc::timeval { tv_sec: left.as_secs() as i64, tv_usec: i64::from(left.subsec_micros()).max(1) };
            let mut frame = vec![0; 70_000];
            // SAFETY: buffers and structures are as long as the calls are told.
            let (length, kind) = unsafe {
                let size = size_of::<libc::timeval>() as u32;
                let fd = self.0.as_raw_fd();
                libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw const time).cast(), size);
                let mut address: libc::sockaddr_ll = std::mem::zeroed();
                let mut size = size_of::<libc::sockaddr_ll>() as u32;
                let from = (&raw mut address).cast();
                (
                    libc::recvfrom(fd, frame.as_mut_ptr().cast(), frame.len(), 0, from, &raw mut size),
                    address.sll_pkttype,
                )
            };
            if length >= 0 && kind != libc::PACKET_OUTGOING {
                frame.truncate(length as usize);
                return Some(frame);
            }
        }
    }
}

struct Rig {
    net: Net,
    driver: Driver,
    wire: Wire,
}

impl Rig {
    fn new(features: u64) -> Self {
        ip("tuntap add dev tap0 mode tap");
        std::fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "1").unwrap_or_default();
        // An interface that is up before its tap is open gets its queue only when the kernel has seen the carrier, later.
        let tap = Tap::open(&config("tap0")).unwrap();
        ip("link set tap0 up mtu 9000");
        let wire = Wire::new("tap0");
        let board = Board::new(QUEUES);
        let net = Net::new(tap, board.wiring()).unwrap();
        let mut driver = Driver::new(board, net.transport(), QUEUE_SIZE);
        driver.start(features);
        Self { net, driver, wire }
    }

    /// What is left when the card is gone.
    fn without_card(self) -> (Board, Vec<DriverQueue>, Wire) {
        let Self { net, driver: Driver { board, queues, transport }, wire } = self;
        drop((net, transport));
        (Board::with_ram(board.ram, QUEUES), queues, wire)
    }

    /// The same driver over a card that was made of this state.
    fn with_card((board, queues, wire): (Board, Vec<DriverQueue>, Wire), state: &StatePayload) -> Self {
        let net = Net::restore(open_again(&config("tap0")), board.wiring(), state).unwrap();
        let driver = Driver { transport: net.transport(), board, queues };
        Self { net, driver, wire }
    }

    /// Gives the card `count` receive buffers; buffer `n` lies at `DATA + n * BUFFER_BYTES`.
    fn offer(&mut self, count: u64) {
        for number in 0..count {
            let at = DATA + number * BUFFER_BYTES;
            self.driver.queues[RX].add(&self.driver.board.ram, &[(at, 0x600, true)]);
        }
        self.driver.kick(RX);
    }

    fn transmit(&mut self, frame: &[u8]) {
        self.driver.put(TX_BUFFER, &[0; 12]);
        self.driver.put(TX_BUFFER + 12, frame);
        let parts = [(TX_BUFFER, 12, false), (TX_BUFFER + 12, frame.len() as u32, false)];
        let head = self.driver.queues[TX].add(&self.driver.board.ram, &parts);
        self.driver.kick(TX);
        assert_eq!(self.driver.wait_used(TX), (head, 0));
    }

    /// The next received frame, without its header.
    fn received(&mut self) -> Vec<u8> {
        let (head, length) = self.driver.wait_used(RX);
        let at = DATA + u64::from(head) * BUFFER_BYTES;
        assert_eq!(self.driver.get(at + 10, 2), [1, 0], "num_buffers");
        self.driver.get(at + 12, length as usize - 12)
    }
}

/// A frame of a protocol that nobody knows.
fn frame(bytes: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![seed; bytes];
    frame[..6].copy_from_slice(&[0xff; 6]);
    frame[6..12].copy_from_slice(&MAC);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

fn arp(address: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC);
    frame.extend(address);
    frame.extend([0; 6]);
    frame.extend([10, 0, 0, 1]);
    frame
}

#[test]
fn frames_pass_both_ways() {
    in_namespace(|| {
        let mut rig = Rig::new(BASIC);
        let mut mac = [0; 6];
        crate::device::BusDevice::read(&mut rig.driver.transport, 0x100, &mut mac);
        assert_eq!(mac, MAC);
        rig.offer(200);
        for round in 0..200u64 {
            let sent = frame(60 + round as usize * 7, round as u8);
            rig.transmit(&sent);
            assert_eq!(rig.wire.receive(Duration::from_secs(5)).unwrap(), sent);
            rig.wire.send(&sent);
            assert_eq!(rig.received(), sent);
        }
        rig.net.pause().unwrap();
        let counters = rig.net.counters();
        assert_eq!(counters.receive_frames.load(Ordering::Relaxed), 200);
        assert_eq!(counters.transmit_frames.load(Ordering::Relaxed), 200);
        assert_eq!(counters.receive_bytes.load(Ordering::Relaxed), counters.transmit_bytes.load(Ordering::Relaxed));
        assert!(rig.driver.board.take_dirty(DATA) && !rig.driver.board.take_dirty(DATA + 250 * BUFFER_BYTES));
    });
}

#[test]
fn a_burst_without_buffers_waits_in_the_tap() {
    in_namespace(|| {
        let mut rig = Rig::new(BASIC);
        for number in 0..3 * BATCH {
            rig.wire.send(&frame(100, number as u8));
        }
        rig.offer(10);
        for number in 0..10 {
            assert_eq!(rig.received(), frame(100, number));
        }
        for number in 10..3 * BATCH {
            let (head, before) = (number as u64 % 64, rig.driver.queues[RX].available);
            let at = DATA + head * BUFFER_BYTES;
            let ram = &rig.driver.board.ram;
            let head = rig.driver.queues[RX].add(ram, &[(at, 0x600, true)]);
            // As a driver does it: either the starved card has asked to be told, or it finds the buffer by itself.
            if rig.driver.queues[RX].notification_wanted(ram, before) {
                rig.driver.kick(RX);
            }
            assert_eq!(rig.driver.wait_used(RX), (head, 112));
            assert_eq!(rig.driver.get(at + 12, 100), frame(100, number as u8));
        }
    });
}

#[test]
fn nothing_waits_for_a_guest_without_a_driver() {
    in_namespace(|| {
        let mut rig = Rig::new(BASIC);
        rig.driver.write(0x70, 0);
        for number in 0..50 {
            rig.wire.send(&frame(100, number));
        }
        rig.driver.start(BASIC);
        rig.wire.send(&frame(100, 99));
        rig.offer(10);
        assert_eq!(rig.received(), frame(100, 99));
    });
}

#[test]
fn what_does_not_fit_is_dropped_and_the_buffer_stays() {
    in_namespace(|| {
        let mut rig = Rig::new(BASIC);
        rig.offer(2);
        rig.wire.send(&frame(0x600 - 12 + 1, 1));
        rig.wire.send(&frame(0x600 - 12, 2));
        assert_eq!(rig.received(), frame(0x600 - 12, 2));
        // Counters follow a batch.
        rig.net.pause().unwrap();
        rig.net.resume().unwrap();
        assert_eq!(rig.net.counters().dropped_frames.load(Ordering::Relaxed), 1);
        // Transmitted frames of impossible lengths.
        for bytes in [0u32, 12, 70_000] {
            rig.driver.queues[TX].add(&rig.driver.board.ram, &[(TX_BUFFER, bytes, false)]);
            rig.driver.kick(TX);
            rig.driver.wait_used(TX);
        }
        rig.transmit(&frame(64, 3));
        assert_eq!(rig.wire.receive(Duration::from_secs(5)).unwrap(), frame(64, 3));
        rig.net.pause().unwrap();
        assert_eq!(rig.net.counters().dropped_frames.load(Ordering::Relaxed), 4);
    });
}

#[test]
fn long_frames_span_mergeable_buffers() {
    in_namespace(|| {
        let mut rig = Rig::new(BASIC | feature::MRG_RXBUF);
        rig.offer(100);
        for bytes in [60, 0x600 - 12, 0x600 - 11, 5000, 9000, 100] {
            let sent = frame(bytes, bytes as u8);
            rig.wire.send(&sent);
            let (first, mut length) = rig.driver.wait_used(RX);
            let at = DATA + u64::from(first) * BUFFER_BYTES;
            let buffers = rig.driver.get(at + 10, 2)[0];
            assert_eq!(usize::from(buffers), (bytes + 12).div_ceil(0x600));
            let mut got = rig.driver.get(at + 12, length as usize - 12);
            for _ in 1..buffers {
                let head;
                (head, length) = rig.driver.wait_used(RX);
                got.extend(rig.driver.get(DATA + u64::from(head) * BUFFER_BYTES, length as usize));
            }
            assert_eq!(got, sent);
        }
    });
}

#[test]
fn a_paused_card_leaves_frames_in_the_tap() {
    in_namespace(|| {
        for merge in [0, feature::MRG_RXBUF] {
            let mut rig = Rig::new(BASIC | merge);
            rig.offer(100);
            rig.wire.send(&frame(70, 1));
            assert_eq!(rig.received(), frame(70, 1));
            rig.net.pause().unwrap();
            let interrupts = rig.driver.read(0x60);
            rig.driver.write(0x64, interrupts);
            let state = rig.net.save().unwrap();
            rig.wire.send(&frame(80, 2));
            rig.driver.put(TX_BUFFER, &[0; 100]);
            rig.driver.queues[TX].add(&rig.driver.board.ram, &[(TX_BUFFER, 100, false)]);
            rig.driver.kick(TX);
            assert!(rig.driver.try_wait_used(RX, Duration::from_millis(50)).is_none());
            assert!(rig.wire.receive(Duration::from_millis(50)).is_none());
            assert_eq!(rig.net.save().unwrap(), state);
            rig.net.resume().unwrap();
            assert_eq!(rig.received(), frame(80, 2));
            assert_eq!(rig.wire.receive(Duration::from_secs(5)).unwrap().len(), 88);
            drop(rig);
            ip("link del tap0");
        }
    });
}

#[test]
fn a_saved_card_goes_on_and_announces_its_guest() {
    in_namespace(|| {
        let mut rig = Rig::new(BASIC | feature::MRG_RXBUF);
        rig.offer(100);
        rig.transmit(&arp([10, 0, 0, 2]));
        assert_eq!(rig.wire.receive(Duration::from_secs(5)).unwrap(), arp([10, 0, 0, 2]));
        rig.net.pause().unwrap();
        let state = rig.net.save().unwrap();
        let rest = rig.without_card();
        let other = NetworkConfig { mac: "02:00:00:00:00:06".into(), ..config("tap0") };
        let refused = Net::restore(open_again(&other), rest.0.wiring(), &state);
        assert!(matches!(refused, Err(DeviceError::State(StateError::Unfit { .. }))));
        drop(refused);
        let mut rig = Rig::with_card(rest, &state);
        wire_is_quiet(&rig.wire);
        rig.net.resume().unwrap();
        rig.net.announce();
        for _ in 0..3 {
            let reverse = rig.wire.receive(Duration::from_secs(5)).unwrap();
            assert_eq!((reverse.len(), &reverse[..6], &reverse[6..12]), (60, &[0xff; 6][..], &MAC[..]));
            assert_eq!((&reverse[12..14], &reverse[20..22]), (&[0x80, 0x35][..], &[0, 3][..]));
            let gratuitous = rig.wire.receive(Duration::from_secs(5)).unwrap();
            assert_eq!((&gratuitous[6..12], &gratuitous[12..14]), (&MAC[..], &[8, 6][..]));
            assert_eq!((&gratuitous[28..32], &gratuitous[38..42]), (&[10, 0, 0, 2][..], &[10, 0, 0, 2][..]));
        }
        wire_is_quiet(&rig.wire);
        rig.wire.send(&frame(90, 9));
        assert_eq!(rig.received(), frame(90, 9));
    });
}

fn wire_is_quiet(wire: &Wire) {
    assert!(wire.receive(Duration::from_millis(200)).is_none());
}

#[test]
fn each_bad_tap_has_its_error() {
    in_namespace(|| {
        ip("tuntap add dev tap0 mode tap");
        let first = Tap::open(&config("tap0")).unwrap();
        let busy = Tap::open(&config("tap0")).unwrap_err();
        assert!(matches!(busy, TapError::Busy { .. }), "{busy}");
        let by_fd = NetworkConfig { source: TapSource::Fd(first.as_raw_fd()), ..config("tap0") };
        Tap::open(&by_fd).unwrap();
        drop(first);
        open_again(&config("tap0"));
        ip("link add veth0 type veth peer name veth1");
        let kind = Tap::open(&config("veth0")).unwrap_err();
        assert!(matches!(kind, TapError::Kind { .. }), "{kind}");
        ip("tuntap add dev tun0 mode tun");
        let kind = Tap::open(&config("tun0")).unwrap_err();
        assert!(matches!(kind, TapError::Kind { .. }), "{kind}");
        let mac = Tap::open(&NetworkConfig { mac: "03:00:00:00:00:05".into(), ..config("tap0") }).unwrap_err();
        assert!(matches!(mac, TapError::Mac { .. }), "{mac}");
    });
}

#[test]
fn a_tap_that_disappears_takes_the_link_down_and_nothing_else() {
    in_namespace(|| {
        let mut rig = Rig::new(BASIC);
        rig.offer(10);
        let generation = rig.driver.read(0xfc);
        ip("link del tap0");
        let mut status = [1];
        let end = Instant::now() + Duration::from_secs(10);
        while status[0] != 0 {
            assert!(Instant::now() < end, "the link stays up");
            rig.driver.wait_interrupt(Duration::from_millis(100));
            crate::device::BusDevice::read(&mut rig.driver.transport, 0x106, &mut status);
        }
        assert_ne!(rig.driver.read(0xfc), generation);
        assert_eq!(rig.driver.read(0x60) & 2, 2);
        rig.transmit(&frame(64, 1));
        rig.net.pause().unwrap();
        rig.net.save().unwrap();
    });
}

/// A generator of numbers that are the same in every run (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

#[test]
fn any_chains_in_both_queues_are_survived() {
    in_namespace(|| {
        let mut rig = Rig::new(BASIC);
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
        let wild = [0, DATA, DATA + 5, TX_BUFFER, 0x10_0000, (16 << 20) - 9, 16 << 20, u64::MAX - 3, 0xd000_0000];
        for round in 0..300u64 {
            let merge = if round % 2 == 0 { feature::MRG_RXBUF } else { 0 };
            rig.driver.start(BASIC | merge);
            for queue in [RX, TX] {
                let ram = &rig.driver.board.ram;
                for index in 0..64 {
                    let kinds = if numbers.next(4) == 0 { 9 } else { 4 };
                    let gpa = wild[numbers.next(kinds) as usize];
                    let bytes = [1, 12, 13, 60, 1500, 70_000, u32::MAX, 0][numbers.next(8) as usize];
                    let next = numbers.next(70) as u16;
                    rig.driver.queues[queue].write_descriptor(ram, index, gpa, bytes, numbers.next(8) as u16, next);
                }
                for _ in 0..numbers.next(40) {
                    rig.driver.queues[queue].offer(ram, numbers.next(66) as u16);
                }
                rig.driver.kick(queue);
            }
            for _ in 0..numbers.next(5) {
                rig.wire.send(&frame(60 + numbers.next(4000) as usize, round as u8));
            }
            rig.net.pause().unwrap();
            rig.net.save().unwrap();
            rig.net.resume().unwrap();
        }
        rig.driver.start(BASIC);
        while rig.wire.receive(Duration::from_millis(20)).is_some() {}
        let sent = frame(99, 9);
        rig.transmit(&sent);
        assert_eq!(rig.wire.receive(Duration::from_secs(5)).unwrap(), sent);
        // What the rounds have left in the tap comes first.
        rig.wire.send(&sent);
        rig.offer(200);
        while rig.received() != sent {}
    });
}
