//! The records of this crate against those of rustls: both ends of a session understand each other whichever of the two
//! protects them, through changes of keys, and what is wrong ends the session with the alert that says so.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

use migration::testing::Authority;
use migration::transport::TransportError;
use migration::transport::stop::Stop;
use migration::transport::stream::TlsStream;
use migration::transport::tcp;
use migration::transport::tls::{Acceptor, Connector, Session};
use rustls::{AlertDescription, Connection, Error};

const LONG: Duration = Duration::from_secs(10);

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let client = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
    (client, listener.accept().expect("a connection").0)
}

/// Sessions of a client and a server that expect each other.
fn sessions() -> (Session, Session) {
    let authority = Authority::new();
    let connector = Connector::new(&authority.issue("a"), "b").expect("identity");
    let acceptor = Acceptor::new(&authority.issue("b"), "a").expect("identity");
    (connector.session().expect("a session"), acceptor.session().expect("a session"))
}

fn ours(session: Session, tcp: TcpStream) -> TlsStream {
    tcp::configure(&tcp).expect("socket options");
    TlsStream::handshake(session, tcp, Stop::default(), LONG).expect("TLS")
}

/// A session of ours, and one that rustls runs by itself in a thread.
fn with_rustls<T: Send + 'static>(
    we_are_client: bool,
    theirs: impl FnOnce(Rustls) -> T + Send + 'static,
) -> (TlsStream, JoinHandle<T>) {
    let ((client, server), (near, far)) = (sessions(), sockets());
    let (mine, other) = if we_are_client { (client, server) } else { (server, client) };
    let thread = std::thread::spawn(move || {
        let (mut tls, mut socket) = (other.into_connection(), far);
        while tls.is_handshaking() {
            tls.complete_io(&mut socket).expect("TLS");
        }
        theirs(Rustls { tls, socket })
    });
    (ours(mine, near), thread)
}

/// Blocking calls on a connection of rustls, whichever role it has.
struct Rustls {
    tls: Connection,
    socket: TcpStream,
}

impl Rustls {
    /// Takes a new key for what is sent, and says so.
    fn refresh(&mut self) {
        self.tls.refresh_traffic_keys().expect("TLS 1.3 can");
        self.flush().expect("sent");
    }
}

impl Read for Rustls {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                done => return done,
            }
            self.tls.read_tls(&mut self.socket)?;
            if let Err(error) = self.tls.process_new_packets() {
                return Err(io::Error::new(ErrorKind::InvalidData, error));
            }
        }
    }
}

impl Write for Rustls {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.tls.writer().write(bytes)?;
        self.flush()?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.socket)?;
        }
        Ok(())
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + length) as u8).collect()
}

const LENGTHS: [usize; 8] = [1, 5, 16_383, 16_384, 16_385, 70_000, 3 << 20, 2];

#[test]
fn rustls_and_we_understand_each_other_in_both_roles() {
    for we_are_client in [true, false] {
        let (mut stream, echo) = with_rustls(we_are_client, |mut tls| {
            for length in LENGTHS {
                let mut bytes = vec![0; length];
                tls.read_exact(&mut bytes).expect("bytes");
                // Each echo is under another key, and so is what we send next: rustls asks for both.
                tls.refresh();
                tls.write_all(&bytes).expect("bytes");
                tls.flush().expect("sent");
            }
            tls.read(&mut [0]).expect("a goodbye is the end, not an error")
        });
        for length in LENGTHS {
            stream.queue(&pattern(length)).expect("queued");
            stream.flush().expect("sent");
            let mut back = vec![0; length];
            stream.read_exact(&mut back, "reading the echo").expect("bytes");
            assert!(back == pattern(length), "{length} bytes");
        }
        assert!(!stream.has_input());
        stream.close();
        assert_eq!(echo.join().expect("no panic"), 0);
    }
}

#[test]
fn records_that_arrive_byte_by_byte_are_put_together() {
    let ((client, server), (near, relay_near), (relay_far, far)) = (sessions(), sockets(), sockets());
    let server = std::thread::spawn(move || {
        let mut stream = ours(server, far);
        let mut bytes = vec![0; 20_000];
        stream.read_exact(&mut bytes, "reading").expect("bytes");
        bytes
    });
    // From the client, some bytes at a time; to the client, as it comes.
    let (mut from, mut to) = (relay_near.try_clone().expect("a socket"), relay_far.try_clone().expect("a socket"));
    let slow = std::thread::spawn(move || {
        to.set_nodelay(true).expect("a socket");
        let mut bytes = [0; 16_384];
        let mut step = 1;
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            for part in bytes[..count].chunks(step) {
                if to.write_all(part).is_err() {
                    return;
                }
            }
            step = step % 7 + 1;
        }
    });
    let (mut back_from, mut back_to) = (relay_far, relay_near);
    let back = std::thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
    let mut stream = ours(client, near);
    stream.queue(&pattern(20_000)).expect("queued");
    stream.flush().expect("sent");
    assert!(server.join().expect("no panic") == pattern(20_000));
    stream.close();
    drop(stream);
    slow.join().expect("no panic");
    let _ = back.join().expect("no panic");
}

#[test]
fn what_is_changed_on_its_way_ends_the_session_with_its_alert() {
    let (mut stream, peer) = with_rustls(true, |mut tls| {
        // A whole record, of the right kind and length, that was not made with the key.
        let mut record = vec![23, 3, 3, 0, 40];
        record.extend([7; 40]);
        tls.socket.write_all(&record).expect("bytes");
        tls.read(&mut [0]).expect_err("we were refused")
    });
    let error = stream.fill("reading").expect_err("it was forged").to_string();
    assert!(error.contains("changed on its way"), "{error}");
    let error = peer.join().expect("no panic");
    let alert = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    assert_eq!(alert, Some(&Error::AlertReceived(AlertDescription::BadRecordMac)), "{error}");
}

#[test]
fn an_unprotected_or_endless_record_is_refused_before_it_is_there() {
    for (head, expected) in [
        ([21, 3, 3, 0, 2], "unprotected"),
        ([23, 3, 3, 0xff, 0xff], "longer than TLS allows"),
        ([22, 3, 3, 0, 9], "unprotected"),
    ] {
        let (mut stream, peer) = with_rustls(false, move |mut tls| {
            tls.socket.write_all(&head).expect("bytes");
            tls.read(&mut [0]).expect_err("we were refused").kind()
        });
        let error = stream.fill("reading").expect_err("it was refused").to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(peer.join().expect("no panic"), ErrorKind::InvalidData);
    }
}

#[test]
fn a_peer_that_only_changes_its_keys_is_refused() {
    let (mut stream, peer) = with_rustls(true, |mut tls| {
        for _ in 0..40 {
            tls.refresh();
        }
        tls.read(&mut [0]).is_err()
    });
    let error = stream.fill("reading").expect_err("it never says anything").to_string();
    assert!(error.contains("carry nothing"), "{error}");
    assert!(peer.join().expect("no panic"));
}

#[test]
fn a_goodbye_and_a_cut_are_both_the_end() {
    for goodbye in [true, false] {
        let (mut stream, peer) = with_rustls(true, move |mut tls| {
            tls.write_all(b"last").expect("bytes");
            if goodbye {
                tls.tls.send_close_notify();
            }
            tls.flush().expect("sent");
        });
        let mut last = [0; 4];
        stream.read_exact(&mut last, "reading").expect("it came before the end");
        peer.join().expect("no panic");
        assert!(matches!(stream.fill("reading"), Err(TransportError::Closed { .. })));
    }
}

#[test]
fn what_did_not_leave_when_a_stop_came_is_the_first_to_leave_after_it() {
    let ((client, server), (near, far)) = (sessions(), sockets());
    let (begin, may_begin) = std::sync::mpsc::channel::<()>();
    let server = std::thread::spawn(move || {
        let mut stream = ours(server, far);
        may_begin.recv().expect("told to");
        let mut bytes = vec![0; (64 << 20) + 5];
        stream.read_exact(&mut bytes, "reading").expect("bytes");
        bytes
    });
    let mut stream = ours(client, near);
    let stop = Stop::default();
    stream.set_stop(stop.clone());
    stream.queue(&pattern(64 << 20)).expect("queued");
    stop.raise();
    // More than both sockets hold, and nobody reads.
    assert!(matches!(stream.flush(), Err(TransportError::Stopped)));
    stream.set_stop(Stop::default());
    stream.queue(b"after").expect("queued");
    begin.send(()).expect("it waits");
    stream.flush().expect("sent");
    let bytes = server.join().expect("no panic");
    assert!(bytes[..64 << 20] == pattern(64 << 20) && bytes[64 << 20..] == *b"after");
}
