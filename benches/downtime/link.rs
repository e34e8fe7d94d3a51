//! The link between the hosts: as quick as this machine, or made narrower, or longer.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::Result;
use hostd::lab::{Lab, LabHost};
use serde::Serialize;

/// What is on its way at once is bounded: 16 MiB in each direction of a connection.
const PIECES: usize = 256;
const PIECE_BYTES: usize = 64 << 10;

/// How the link differs from loopback; both machines' migrations meet the same.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Link {
    /// Token bucket (`tc-tbf(8)`) on both hosts' ports, in MiB per second.
    pub mib_per_second: Option<u32>,
    /// Added to each direction of the migration's connections, in milliseconds, by a relay of our own.
    pub delay_ms: Option<u32>,
}

impl Link {
    /// What is to be said of it beside the results; nothing of loopback.
    pub fn words(&self) -> String {
        let mut words = String::new();
        if let Some(rate) = self.mib_per_second {
            words += &format!(" The link carried {rate} MiB/s.");
        }
        if let Some(delay) = self.delay_ms {
            words += &format!(" It took {delay} ms in each direction.");
        }
        words
    }

    /// Narrows the ports of all hosts.
    pub fn shape(&self, lab: &Lab) -> Result<()> {
        if let Some(rate) = self.mib_per_second {
            for host in lab.hosts() {
                lab.fabric().shape(host.name(), Some(u64::from(rate) << 20))?;
            }
        }
        Ok(())
    }

    /// Where to connect to, instead of `target` on `host`.
    pub fn route(&self, host: &LabHost, target: SocketAddr) -> Result<SocketAddr> {
        match self.delay_ms {
            Some(delay) => relay(host, target, Duration::from_millis(delay.into())),
            None => Ok(target),
        }
    }
}

/// Listens beside `target` on its host, and passes everything on `delay` later. Ends with the process: connections end by
/// themselves, and a lab's hosts are gone with the run.
fn relay(host: &LabHost, target: SocketAddr, delay: Duration) -> Result<SocketAddr> {
    let listener = host.namespace().run(|| TcpListener::bind((IpAddr::V4(host.address()), 0)))??;
    let address = listener.local_addr()?;
    let namespace = hostd::lab::namespace::Namespace::open(host.namespace().name())?;
    std::thread::spawn(move || -> Result<()> {
        namespace.enter()?;
        for from in listener.incoming() {
            let from = from?;
            // Whoever is refused here sees it as it would see it there, and may try again.
            let Ok(to) = TcpStream::connect(target) else { continue };
            for stream in [&from, &to] {
                stream.set_nodelay(true)?;
            }
            for (from, to) in [(from.try_clone()?, to.try_clone()?), (to, from)] {
                let (put, take) = sync_channel(PIECES);
                let ends = (from.try_clone()?, to.try_clone()?);
                std::thread::spawn(move || read(from, &put, delay));
                std::thread::spawn(move || {
                    write(to, &take);
                    let _ = ends.0.shutdown(Shutdown::Read);
                    let _ = ends.1.shutdown(Shutdown::Write);
                });
            }
        }
        Ok(())
    });
    Ok(address)
}

/// Takes what arrives, with the moment at which it is due.
fn read(mut from: TcpStream, put: &SyncSender<(Instant, Vec<u8>)>, delay: Duration) {
    loop {
        let mut piece = vec![0; PIECE_BYTES];
        match from.read(&mut piece) {
            Ok(0) | Err(_) => return,
            Ok(count) => {
                piece.truncate(count);
                if put.send((Instant::now() + delay, piece)).is_err() {
                    return;
                }
            }
        }
    }
}

fn write(mut to: TcpStream, take: &Receiver<(Instant, Vec<u8>)>) {
    for (due, piece) in take {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            return;
        }
    }
}
