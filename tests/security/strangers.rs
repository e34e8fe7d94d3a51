//! What somebody sends who was not invited.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use hostd::config::TlsPaths;

const TIMEOUT: Duration = Duration::from_secs(3);

/// Connects, sends, and reads what comes back until the other side closes or falls silent.
pub fn send(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let Ok(mut stream) = TcpStream::connect_timeout(&address, TIMEOUT) else { return Vec::new() };
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    // The other side may have hung up in the middle of it.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.take(1 << 20).read_to_end(&mut answer);
    answer
}

/// Requests in plain text, noise, and TLS records that lie about their length.
pub fn garbage() -> Vec<(&'static str, Vec<u8>)> {
    let noise: Vec<u8> = (0..100_000u32).map(|place| place.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    let mut oversized = vec![0x16, 3, 1, 0xff, 0xff];
    oversized.extend(vec![1; 0xffff]);
    let mut hello_of_16_mib = vec![0x16, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff];
    hello_of_16_mib.extend(vec![0; 0x4000 - 4]);
    vec![
        ("plain HTTP", b"GET /v1/peer/summary HTTP/1.1\r\nhost: a1\r\n\r\n".to_vec()),
        ("noise", noise),
        ("an oversized record", oversized),
        ("a hello of 16 MiB", hello_of_16_mib),
        ("half a record", vec![0x16, 3, 1, 1]),
        ("nothing", Vec::new()),
    ]
}

/// How `openssl s_client` with these arguments fares: what it prints.
pub fn openssl(address: SocketAddr, name: &str, ca: &Path, identity: Option<&TlsPaths>, version: &str) -> String {
    let mut command = Command::new("openssl");
    command.args([
        "s_client",
        "-connect",
        &address.to_string(),
        "-servername",
        name,
        version,
        "-verify_return_error",
        "-ign_eof",
    ]);
    // 1.2 would otherwise be refused by openssl's own policy on some systems.
    command.args(["-cipher", "DEFAULT:@SECLEVEL=0"]).arg("-CAfile").arg(ca);
    if let Some(identity) = identity {
        command.arg("-cert").arg(&identity.certificate).arg("-key").arg(&identity.key);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("openssl (Debian's package openssl)");
    // Something to be answered: a client certificate is refused after TLS 1.3's handshake is over for the client.
    let _ = child.stdin.take().expect("its input").write_all(b"GET / HTTP/1.1\r\n\r\n");
    let output = child.wait_with_output().unwrap();
    format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
