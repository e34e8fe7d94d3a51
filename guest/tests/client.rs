//! The client against a peer that loses, delays and refuses.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use headroom_guest::{Client, ClientError, Reply, Request, Settings, Status};

/// A peer on loopback that answers each datagram with what `answer` makes of it: any number of replies.
fn peer(mut answer: impl FnMut(Request) -> Vec<Vec<u8>> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a loopback socket");
    let address = socket.local_addr().expect("its address");
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((bytes, from)) = socket.recv_from(&mut buffer) {
            for reply in answer(serde_json::from_slice(&buffer[..bytes]).expect("a request")) {
                socket.send_to(&reply, from).expect("room for a datagram");
            }
        }
    });
    address
}

fn status(id: Option<u64>, heartbeat: u64) -> Vec<u8> {
    serde_json::to_vec(&Reply::Status(Status { id, heartbeat, ..Status::default() })).expect("a status is JSON")
}

#[test]
fn a_lost_datagram_is_sent_again() {
    let mut seen = 0;
    let address = peer(move |request| {
        seen += 1;
        if seen < 3 { vec![] } else { vec![status(request.id, seen)] }
    });
    assert_eq!(Client::connect(address).unwrap().status().unwrap().heartbeat, 3);
}

#[test]
fn a_late_answer_to_an_earlier_request_is_passed_over() {
    let address = peer(|request| vec![status(Some(999), 1), status(None, 2), status(request.id, 3)]);
    assert_eq!(Client::connect(address).unwrap().status().unwrap().heartbeat, 3);
}

#[test]
fn a_refusal_and_nonsense_are_told_apart() {
    let address = peer(|request| match request.set {
        Some(_) => vec![br#"{"error":"not today"}"#.to_vec()],
        None => vec![b"SSH-2.0".to_vec()],
    });
    let mut client = Client::connect(address).unwrap();
    let refused = client.set(Settings::default()).unwrap_err();
    assert!(matches!(&refused, ClientError::Refused { message, .. } if message == "not today"), "{refused}");
    assert!(matches!(client.status().unwrap_err(), ClientError::Malformed { .. }));
}

#[test]
fn silence_and_a_closed_port_end_at_the_deadline() {
    let silent = peer(|_| vec![]);
    // Bound and dropped: nobody listens there.
    let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for address in [silent, closed] {
        let mut client = Client::connect(address).unwrap();
        client.set_deadline(Duration::from_millis(450));
        let start = Instant::now();
        let error = client.status().unwrap_err();
        assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
        assert!(start.elapsed() >= Duration::from_millis(450));
    }
}

#[test]
fn a_closed_tcp_connection_is_an_error() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut client = Client::connect_tcp(address).unwrap();
    drop(listener.accept().unwrap());
    drop(listener);
    let error = client.status().unwrap_err();
    assert!(matches!(error, ClientError::Socket { .. }), "{error}");
    assert!(matches!(Client::connect_tcp(address), Err(ClientError::Socket { .. })));
}
