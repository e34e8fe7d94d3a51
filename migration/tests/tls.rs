//! Who is let in, and what the one who is not gets to read.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use migration::report::Outcome;
use migration::testing::{Authority, Owner, Pair, Workload, machines, settle};

/// Runs a migration that must not happen; returns both reasons.
fn refused(change: impl FnOnce(&mut Pair)) -> (String, String) {
    let (world, source, destination) = machines(64, &[]);
    source.boot(Workload { filled_pages: 20, ..Workload::default() });
    let mut pair = Pair::new();
    // The destination goes on waiting after each of these.
    pair.destination_options.deadline = Duration::from_millis(800);
    change(&mut pair);
    let (report, received) = pair.run(&source, &destination);
    assert_eq!(report.outcome, Outcome::Failed);
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Source));
    assert_eq!(destination.faults.calls("prepare"), 0);
    (report.reason, received.expect_err("nothing arrives").to_string())
}

#[test]
fn another_authority() {
    let (source, destination) = refused(|pair| pair.source_options.identity = Authority::new().issue("host-a"));
    assert!(source.contains("not issued by this host's authority"), "{source}");
    assert!(destination.contains("authority"), "{destination}");
}

#[test]
fn a_client_of_another_authority() {
    // The source trusts the destination, but not the other way round.
    let (source, destination) = refused(|pair| {
        let mut identity = Authority::new().issue("host-a");
        identity.ca_pem = pair.authority.pem().to_owned();
        pair.source_options.identity = identity;
    });
    assert!(source.contains("refused this host's certificate") && source.contains("tls.ca"), "{source}");
    assert!(destination.contains("not issued by this host's authority"), "{destination}");
}

#[test]
fn a_destination_with_another_name() {
    let (source, _) = refused(|pair| pair.source_options.destination_host = "host-c".to_owned());
    assert!(source.contains("not that of host `host-c`") && source.contains("host-b"), "{source}");
}

#[test]
fn a_source_with_another_name() {
    let (source, destination) = refused(|pair| pair.source_options.identity = pair.authority.issue("host-x"));
    assert!(source.contains("expects another source"), "{source}");
    assert!(destination.contains("not that of host `host-a`") && destination.contains("host-x"), "{destination}");
}

#[test]
fn an_expired_source() {
    let (source, destination) = refused(|pair| pair.source_options.identity = pair.authority.issue_expired("host-a"));
    assert!(source.contains("refused this host's certificate") && source.contains("expired"), "{source}");
    assert!(destination.contains("expired"), "{destination}");
}

#[test]
fn an_expired_destination() {
    let (source, _) = refused(|pair| pair.destination_options.identity = pair.authority.issue_expired("host-b"));
    assert!(source.contains("expired"), "{source}");
}

#[test]
fn unusable_identities() {
    let (source, _) = refused(|pair| pair.source_options.identity.key_pem = "nonsense".to_owned());
    assert!(source.contains("TLS key cannot be used"), "{source}");
    let (source, _) = refused(|pair| pair.source_options.identity.ca_pem = String::new());
    assert!(source.contains("authority (ca)"), "{source}");
    let (_, destination) = refused(|pair| {
        pair.destination_options.identity.key_pem = pair.authority.issue("host-b").key_pem;
        pair.source_options.address = "127.0.0.1:9".parse().expect("an address");
    });
    assert!(destination.contains("certificate or key"), "{destination}");
    let (source, _) = refused(|pair| pair.source_options.destination_host = "no host name!".to_owned());
    assert!(source.contains("is not a DNS name"), "{source}");
}

#[test]
fn nobody_listens() {
    let (source, _) = refused(|pair| {
        let closed = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
        pair.source_options.address = closed;
    });
    assert!(source.contains("cannot connect to 127.0.0.1:") && source.contains("refused"), "{source}");
}

/// Strangers of all kinds knock first; the right source comes after them and is served.
#[test]
fn strangers_do_not_end_the_wait() {
    let (world, source, destination) = machines(64, &[]);
    source.boot(Workload { filled_pages: 20, ..Workload::default() });
    let mut pair = Pair::new();
    let address = pair.address();
    let receiving = pair.receive(&destination);
    let mut silent = Vec::new();
    // Plain text, TLS 1.2, half a record, nothing at all.
    let mut answers = Vec::new();
    for bytes in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &tls12_hello(), &[0x16, 3, 1, 2, 0, 1], b""] {
        let mut stranger = TcpStream::connect(address).expect("the destination listens");
        stranger.write_all(bytes).expect("it takes bytes");
        stranger.set_read_timeout(Some(Duration::from_secs(1))).expect("a timeout");
        if bytes.len() > 10 {
            let mut answer = Vec::new();
            let _ = stranger.read_to_end(&mut answer);
            answers.push(answer);
        } else {
            silent.push(stranger);
        }
    }
    // Both get an alert and nothing else; 70 is protocol_version.
    assert!(answers.iter().all(|answer| answer.first() == Some(&21)), "{answers:?}");
    assert_eq!(answers[1][5..], [2, 70], "{answers:?}");
    let report = pair.send(&source);
    let received = receiving.join().expect("no panic");
    assert_eq!(settle(&world, &source, &destination, &report, &received), Ok(Owner::Destination));
}

/// More half-open connections than are allowed: the rest is dropped, and once they have gone the source is served.
#[test]
fn half_open_connections_are_few() {
    let (_, _, destination) = machines(64, &[]);
    let mut pair = Pair::new();
    pair.destination_options.deadline = Duration::from_secs(2);
    let address = pair.address();
    let receiving = pair.receive(&destination);
    let mut strangers: Vec<_> = (0..12).map(|_| TcpStream::connect(address).expect("it listens")).collect();
    let mut dropped = 0;
    for stranger in &mut strangers {
        stranger.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        dropped += usize::from(matches!(stranger.read(&mut [0; 16]), Ok(0)));
    }
    assert_eq!(dropped, 12 - 8);
    drop(strangers);
    assert!(receiving.join().expect("no panic").is_err());
}

/// A ClientHello (RFC 5246) that offers TLS 1.2 only: no supported_versions extension.
fn tls12_hello() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0xc0, 0x2f, 1, 0]);
    // supported_groups x25519, signature_algorithms rsa_pss_rsae_sha256
    let extensions: [u8; 16] = [0, 10, 0, 4, 0, 2, 0, 29, 0, 13, 0, 4, 0, 2, 8, 4];
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    record(1, &body)
}

fn record(handshake: u8, body: &[u8]) -> Vec<u8> {
    let mut message = vec![handshake, 0, (body.len() >> 8) as u8, body.len() as u8];
    message.extend_from_slice(body);
    let mut record = vec![22, 3, 3, (message.len() >> 8) as u8, message.len() as u8];
    record.extend(message);
    record
}

/// What the source says to a port that answers with `answer`.
fn source_meets(answer: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the source connects");
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(&answer);
        if !answer.is_empty() {
            let _ = stream.read(&mut [0; 4096]);
        }
    });
    let (world, source, _) = machines(64, &[]);
    source.boot(Workload::default());
    let mut pair = Pair::new();
    pair.source_options.address = address;
    let report = pair.send(&source);
    server.join().expect("no panic");
    assert_eq!((report.outcome, world.running()), (Outcome::Failed, vec!["a"]));
    report.reason
}

#[test]
fn the_source_meets_other_services() {
    let reason = source_meets(b"SSH-2.0-OpenSSH_9.2p1\r\n".to_vec());
    assert!(reason.contains("does not speak TLS") && reason.contains("SSH-2.0"), "{reason}");
    // A TLS 1.2 server: ServerHello without supported_versions.
    let mut hello = vec![3, 3];
    hello.extend([9; 32]);
    hello.extend([0, 0xc0, 0x2f, 0]);
    let reason = source_meets(record(2, &hello));
    assert!(reason.contains("TLS 1.3"), "{reason}");
    let reason = source_meets(vec![21, 3, 3, 0, 2, 2, 70]);
    assert!(reason.contains("TLS 1.3"), "{reason}");
    let reason = source_meets(Vec::new());
    assert!(reason.contains("closed the connection during the TLS handshake"), "{reason}");
}
