//! The network: ARP, ICMP echo, UDP and TCP echo on port 7, the control protocol on UDP and TCP port 9000.

mod services;

use alloc::vec;
use alloc::vec::Vec;

use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Cidr};

use crate::protocol::{CONTROL_PORT, ECHO_PORT, REQUEST_BYTES_MAX, workload::Workload};
use crate::time::{MICROSECOND, MILLISECOND, Next};
use crate::virtio::net::Net;

/// TCP connections at once.
const ECHO_CONNECTIONS: usize = 8;
const CONTROL_CONNECTIONS: usize = 4;
/// Buffers of a connection, in bytes and direction.
const ECHO_BYTES: usize = 64 << 10;
const CONTROL_BYTES: usize = 8 << 10;
/// Datagrams that may wait, and their bytes.
const UDP_ECHO: (usize, usize) = (256, 256 << 10);
const UDP_CONTROL: (usize, usize) = (16, 32 << 10);
/// Frames handled in one pass of the main loop, so that a flood leaves time for the workload.
const FRAMES_A_PASS: usize = 32;
/// A peer that is gone for this long loses its connection, which frees its slot. It is far longer than any blackout.
const PEER_TIMEOUT: Duration = Duration::from_secs(120);
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// When to look again for room in a full transmit queue.
const RETRY: u64 = MILLISECOND;

/// Answers control requests; what it returns is sent back.
pub trait Control {
    /// Handles one request.
    fn answer(&mut self, request: &[u8]) -> Vec<u8>;
}

/// The network stack with its sockets.
pub struct Network {
    device: Net,
    interface: Interface,
    sockets: SocketSet<'static>,
    udp_echo: SocketHandle,
    udp_control: SocketHandle,
    tcp_echo: [SocketHandle; ECHO_CONNECTIONS],
    tcp_control: [SocketHandle; CONTROL_CONNECTIONS],
}

fn udp_socket(port: u16, (datagrams, bytes): (usize, usize)) -> udp::Socket<'static> {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; datagrams], vec![0; bytes]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    // A new socket can be bound to any port but 0.
    let _ = socket.bind(port);
    socket
}

fn tcp_socket(bytes: usize) -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; bytes]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket.set_keep_alive(Some(KEEP_ALIVE));
    socket.set_timeout(Some(PEER_TIMEOUT));
    socket
}

fn instant(now: u64) -> Instant {
    Instant::from_micros((now / MICROSECOND) as i64)
}

impl Network {
    /// Starts the stack on `device`; without an address in `workload` it has none and answers nothing. `seed` makes
    /// initial sequence numbers differ from boot to boot.
    pub fn new(mut device: Net, mac: [u8; 6], workload: &Workload, seed: u64, now: u64) -> Self {
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(mac)));
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut device, instant(now));
        if let Some(address) = workload.ip {
            interface.update_ip_addrs(|addresses| {
                // The list is empty and has room for two.
                let _ = addresses.push(IpCidr::Ipv4(Ipv4Cidr::new(address.ip, address.prefix)));
            });
        }
        if let Some(gateway) = workload.gateway {
            // The table is empty and has room for two.
            let _ = interface.routes_mut().add_default_ipv4_route(gateway);
        }
        let mut sockets = SocketSet::new(Vec::new());
        let udp_echo = sockets.add(udp_socket(ECHO_PORT, UDP_ECHO));
        let udp_control = sockets.add(udp_socket(CONTROL_PORT, UDP_CONTROL));
        let tcp_echo = [(); ECHO_CONNECTIONS].map(|()| sockets.add(tcp_socket(ECHO_BYTES)));
        let tcp_control = [(); CONTROL_CONNECTIONS].map(|()| sockets.add(tcp_socket(CONTROL_BYTES)));
        let mut network = Self { device, interface, sockets, udp_echo, udp_control, tcp_echo, tcp_control };
        network.listen();
        network
    }

    /// Does what there is to do, at most [`FRAMES_A_PASS`] frames of it.
    pub fn poll(&mut self, time: u64, control: &mut impl Control) -> Next {
        self.device.acknowledge();
        let now = instant(time);
        let mut frames = 0;
        while frames < FRAMES_A_PASS {
            match self.interface.poll_ingress_single(now, &mut self.device, &mut self.sockets) {
                PollIngressSingleResult::None => break,
                PollIngressSingleResult::PacketProcessed | PollIngressSingleResult::SocketStateChanged => frames += 1,
            }
        }
        if frames != 0 {
            self.serve(control);
        }
        for _ in 0..2 * FRAMES_A_PASS {
            match self.interface.poll_egress(now, &mut self.device, &mut self.sockets) {
                PollResult::None => break,
                PollResult::SocketStateChanged => self.listen(),
            }
        }
        self.device.finish();
        if !self.device.can_send() {
            return Next::At(time + RETRY);
        }
        if frames == FRAMES_A_PASS {
            return Next::Now;
        }
        match self.interface.poll_at(now, &self.sockets) {
            None => Next::Never,
            Some(time) if time <= now => Next::Now,
            Some(time) => Next::At(time.total_micros() as u64 * MICROSECOND),
        }
    }

    fn serve(&mut self, control: &mut impl Control) {
        services::echo_datagrams(self.sockets.get_mut(self.udp_echo));
        services::control_datagrams(self.sockets.get_mut(self.udp_control), control);
        for handle in self.tcp_echo {
            services::echo_stream(self.sockets.get_mut(handle));
        }
        for handle in self.tcp_control {
            services::control_stream(self.sockets.get_mut(handle), control, REQUEST_BYTES_MAX);
        }
        self.listen();
    }

    /// Lets sockets whose connection is over wait for the next one.
    fn listen(&mut self) {
        let ports = [(&self.tcp_echo[..], ECHO_PORT), (&self.tcp_control[..], CONTROL_PORT)];
        for (handles, port) in ports {
            for &handle in handles {
                let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
                if !socket.is_open() {
                    // A closed socket can listen on any port but 0.
                    let _ = socket.listen(port);
                }
            }
        }
    }

    /// Switches the interrupt of arriving frames on or off, and says whether there is one already.
    pub fn set_interrupts(&mut self, enable: bool) -> bool {
        self.device.set_interrupts(enable)
    }

    /// Frames received and sent.
    pub fn counters(&self) -> (u64, u64) {
        self.device.counters()
    }
}
