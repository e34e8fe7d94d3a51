//! A relay that counts TLS records and cuts all connections after a given one.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Where to cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Which connection, in the order in which they are made.
    pub connection: usize,
    /// Records that flow to the destination, or back.
    pub to_destination: bool,
    /// So many records pass; the next one does not.
    pub records: usize,
    /// Half of the next one passes.
    pub half: bool,
}

/// A running relay.
pub struct Proxy {
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    cut: Option<Cut>,
    done: AtomicBool,
    refusing: AtomicBool,
    connections: AtomicUsize,
    sockets: Mutex<Vec<TcpStream>>,
}

impl State {
    fn cut_all(&self) {
        self.done.store(true, Ordering::SeqCst);
        for socket in self.sockets.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Proxy {
    /// Relays to `destination`.
    pub fn start(destination: SocketAddr, cut: Option<Cut>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port on the loopback");
        let address = listener.local_addr().expect("the address of a bound socket");
        let state = Arc::new(State {
            cut,
            done: AtomicBool::new(false),
            refusing: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            sockets: Mutex::default(),
        });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for (number, source) in listener.incoming().enumerate() {
                let (Ok(source), false) = (source, shared.done.load(Ordering::SeqCst)) else { return };
                shared.connections.fetch_add(1, Ordering::SeqCst);
                if shared.refusing.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(target) = TcpStream::connect(destination) else { return };
                let _ = (source.set_nodelay(true), target.set_nodelay(true));
                for to_destination in [true, false] {
                    let (Ok(source), Ok(target)) = (source.try_clone(), target.try_clone()) else { return };
                    let mut all = shared.sockets.lock().unwrap_or_else(PoisonError::into_inner);
                    all.extend([source.try_clone(), target.try_clone()].into_iter().flatten());
                    drop(all);
                    let state = Arc::clone(&shared);
                    let (from, to) = if to_destination { (source, target) } else { (target, source) };
                    std::thread::spawn(move || relay(from, to, number, to_destination, &state));
                }
            }
        });
        Self { address, state }
    }

    /// Where the source shall connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether the cut was made.
    pub fn was_cut(&self) -> bool {
        self.state.done.load(Ordering::SeqCst)
    }

    /// Cuts every connection that there is. New ones are relayed, unless they are `refused`.
    pub fn sever(&self, refused: bool) {
        self.state.refusing.store(refused, Ordering::SeqCst);
        for socket in self.state.sockets.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Connections that came so far, relayed or refused.
    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Cuts everything now.
    pub fn cut_now(&self) {
        self.state.cut_all();
    }
}

fn relay(mut from: TcpStream, mut to: TcpStream, connection: usize, to_destination: bool, state: &State) {
    let mut record = Vec::new();
    for records in 0.. {
        record.resize(5, 0);
        if from.read_exact(&mut record).is_err() {
            break;
        }
        let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
        record.resize(5 + length, 0);
        if from.read_exact(&mut record[5..]).is_err() {
            break;
        }
        if let Some(cut) = state.cut
            && (cut.connection, cut.to_destination, cut.records) == (connection, to_destination, records)
        {
            if cut.half {
                let _ = to.write_all(&record[..record.len() / 2]);
            }
            state.cut_all();
            return;
        }
        if to.write_all(&record).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
