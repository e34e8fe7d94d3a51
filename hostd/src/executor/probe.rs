//! Questions to a guest from the host that it has arrived at.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::FromRawFd;
use std::time::{Duration, Instant};

use migration::report::Probe;

use crate::api::types::ProbeSpec;

/// How long a guest may take to answer in all.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long one attempt waits.
const ATTEMPT: Duration = Duration::from_millis(500);

/// What a TCP echo probe sends.
const MESSAGE: &[u8] = b"headroom probe: please send this back\n";

/// Asks all probes at the same time; the answers are in the order of the questions.
pub async fn ask_all(probes: Vec<ProbeSpec>) -> Vec<Probe> {
    let tasks: Vec<_> = probes.into_iter().map(|probe| tokio::task::spawn_blocking(move || ask(&probe))).collect();
    let mut answers = Vec::new();
    for task in tasks {
        answers.push(task.await.unwrap_or_else(|error| Probe {
            name: "probe".to_owned(),
            ok: false,
            detail: format!("could not be asked: {error}"),
        }));
    }
    answers
}

/// Those that were not answered as declared, in words.
pub fn failed(probes: &[Probe]) -> impl Iterator<Item = String> + '_ {
    probes.iter().filter(|probe| !probe.ok).map(|probe| format!("probe {}: {}", probe.name, probe.detail))
}

fn ask(probe: &ProbeSpec) -> Probe {
    let name = match probe {
        ProbeSpec::Ping(address) => format!("ping {address}"),
        ProbeSpec::Tcp(address) => format!("tcp {address}"),
        ProbeSpec::TcpEcho(address) => format!("tcp echo {address}"),
    };
    let start = Instant::now();
    let mut attempts = 0;
    loop {
        attempts += 1;
        let result = match probe {
            ProbeSpec::Ping(address) => ping(*address, attempts),
            ProbeSpec::Tcp(address) => TcpStream::connect_timeout(address, ATTEMPT).map(drop),
            ProbeSpec::TcpEcho(address) => echo(address),
        };
        match result {
            Ok(()) => {
                let detail = format!("{:.1} ms, attempt {attempts}", start.elapsed().as_secs_f64() * 1e3);
                return Probe { name, ok: true, detail };
            }
            Err(error) if start.elapsed() >= PATIENCE => {
                // What the kernel calls a receive timeout says nothing to an operator.
                let silent = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
                let error = if silent { "no answer".to_owned() } else { error.to_string() };
                return Probe { name, ok: false, detail: format!("{attempts} attempts in 5 s: {error}") };
            }
            // An immediate refusal (no route, connection refused) is asked again after a moment, not in a tight loop.
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn echo(address: &SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(address, ATTEMPT)?;
    stream.set_read_timeout(Some(ATTEMPT))?;
    stream.set_write_timeout(Some(ATTEMPT))?;
    stream.write_all(MESSAGE)?;
    let mut answer = [0; MESSAGE.len()];
    stream.read_exact(&mut answer)?;
    if answer == MESSAGE { Ok(()) } else { Err(io::Error::other("it sent back something else")) }
}

/// One ICMP echo (RFC 792, RFC 4443) through a datagram ICMP socket, or a raw one where these are not allowed.
fn ping(address: IpAddr, sequence: u16) -> io::Result<()> {
    let (socket, raw) = match icmp_socket(address, libc::SOCK_DGRAM) {
        Ok(socket) => (socket, false),
        Err(_) => (icmp_socket(address, libc::SOCK_RAW)?, true),
    };
    socket.set_read_timeout(Some(ATTEMPT))?;
    // Identifies this request: a raw socket sees the answers to everybody's.
    let secret = crate::digest::random::<8>().map_err(io::Error::other)?;
    let request = echo_request(address, sequence, &secret);
    socket.send_to(&request, SocketAddr::new(address, 0))?;
    let deadline = Instant::now() + ATTEMPT;
    let mut packet = [0; 2048];
    while Instant::now() < deadline {
        let (length, from) = socket.recv_from(&mut packet)?;
        let message = if raw && address.is_ipv4() { skip_ipv4_header(&packet[..length]) } else { &packet[..length] };
        if from.ip() == address && is_answer(address, message, &secret) {
            return Ok(());
        }
    }
    Err(io::Error::from(io::ErrorKind::TimedOut))
}

fn icmp_socket(address: IpAddr, kind: libc::c_int) -> io::Result<UdpSocket> {
    let (family, protocol) = match address {
        IpAddr::V4(_) => (libc::AF_INET, libc::IPPROTO_ICMP),
        IpAddr::V6(_) => (libc::AF_INET6, libc::IPPROTO_ICMPV6),
    };
    // SAFETY: no pointers; the result is checked.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and belongs to nobody else. `UdpSocket` serves for its sendto and recvfrom, which are
    // the same system calls for every datagram socket.
    Ok(unsafe { UdpSocket::from_raw_fd(fd) })
}

fn echo_request(address: IpAddr, sequence: u16, secret: &[u8; 8]) -> Vec<u8> {
    let kind = if address.is_ipv4() { 8 } else { 128 };
    let mut packet = vec![kind, 0, 0, 0, secret[0], secret[1]];
    packet.extend_from_slice(&sequence.to_be_bytes());
    packet.extend_from_slice(secret);
    // The kernel fills in the checksum of ICMPv6, and of ICMP on datagram sockets; raw ICMP needs it from us.
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

fn is_answer(address: IpAddr, message: &[u8], secret: &[u8; 8]) -> bool {
    let kind = if address.is_ipv4() { 0 } else { 129 };
    message.first() == Some(&kind) && message.get(8..16) == Some(secret.as_slice())
}

fn skip_ipv4_header(packet: &[u8]) -> &[u8] {
    let length = packet.first().map_or(0, |first| usize::from(first & 0x0f) * 4);
    packet.get(length..).unwrap_or_default()
}

/// The Internet checksum (RFC 1071).
fn checksum(packet: &[u8]) -> u16 {
    let words = packet.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Folded to 16 bits by the loop above.
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_rfc() {
        // RFC 1071, section 3: the sum of these words is 0xddf2.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }

    #[tokio::test]
    async fn the_loopback_answers_and_a_closed_port_does_not() {
        let echo = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = echo.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in echo.incoming().flatten() {
                let _ = io::copy(&mut &stream, &mut &stream);
            }
        });
        let mute = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let closed = {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            listener.local_addr().unwrap()
        };
        let probes = vec![
            ProbeSpec::Ping(Ipv4Addr::LOCALHOST.into()),
            ProbeSpec::TcpEcho(address),
            ProbeSpec::Tcp(mute.local_addr().unwrap()),
            ProbeSpec::TcpEcho(mute.local_addr().unwrap()),
            ProbeSpec::Tcp(closed),
        ];
        let answers = ask_all(probes).await;
        let ok: Vec<bool> = answers.iter().map(|answer| answer.ok).collect();
        assert_eq!(ok, [true, true, true, false, false], "{answers:?}");
    }
}
