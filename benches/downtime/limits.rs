//! Physical limits, measured in the same run: what no migration on this machine can beat.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::session::connections;
use crate::{fio, latency};

/// Bytes moved for each measurement: enough to leave the caches, little enough to take a second at worst.
const BYTES: usize = 512 << 20;
const CHUNK: usize = 256 << 10;

/// Limits in bytes per second.
#[derive(Clone, Debug, Serialize)]
pub struct Limits {
    /// Copy of memory on one core, source and target both outside the caches.
    pub memory_copy_bytes_per_second: f64,
    /// One loopback TCP stream.
    pub loopback_tcp_bytes_per_second: f64,
    /// rustls, TLS 1.3 AES-256-GCM, one core, in memory: encrypting.
    pub tls_encrypt_bytes_per_second: f64,
    /// The same, decrypting.
    pub tls_decrypt_bytes_per_second: f64,
    /// One TLS stream over loopback, both ends in threads of their own: what one channel carries at best.
    pub tls_loopback_bytes_per_second: f64,
    /// `UFFDIO_COPY` into fresh memory in pieces of 16 KiB, one thread.
    pub userfaultfd_copy_bytes_per_second: Option<f64>,
    /// A page asked for and got over TLS on loopback, median in microseconds.
    pub tls_round_trip_us: f64,
    /// A bare userfaultfd fault that another thread serves, median in microseconds.
    pub fault_us: Option<f64>,
    /// fio on a file where the machines' disks are, reading.
    pub disk_read_bytes_per_second: Option<f64>,
    /// The same, writing.
    pub disk_write_bytes_per_second: Option<f64>,
}

impl Limits {
    /// Measures all of them, one after the other.
    pub fn measure() -> Result<Self> {
        let (encrypt, decrypt) = tls()?;
        let disk = fio::rates(&std::env::temp_dir())?;
        Ok(Self {
            memory_copy_bytes_per_second: memory_copy(),
            loopback_tcp_bytes_per_second: loopback()?,
            tls_encrypt_bytes_per_second: encrypt,
            tls_decrypt_bytes_per_second: decrypt,
            tls_loopback_bytes_per_second: tls_loopback()?,
            userfaultfd_copy_bytes_per_second: latency::copy_bytes_per_second()?,
            tls_round_trip_us: latency::round_trip_us()?,
            fault_us: latency::fault_us()?,
            disk_read_bytes_per_second: disk.map(|(read, _)| read),
            disk_write_bytes_per_second: disk.map(|(_, write)| write),
        })
    }
}

fn rate(bytes: usize, taken: Duration) -> f64 {
    bytes as f64 / taken.as_secs_f64()
}

fn memory_copy() -> f64 {
    let source = vec![1u8; BYTES / 2];
    let mut target = vec![2u8; BYTES / 2];
    let started = Instant::now();
    for _ in 0..2 {
        target.copy_from_slice(std::hint::black_box(&source));
        std::hint::black_box(&target);
    }
    rate(BYTES, started.elapsed())
}

fn loopback() -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let sender = std::thread::spawn(move || -> std::io::Result<()> {
        let mut stream = TcpStream::connect(address)?;
        let buffer = vec![1u8; CHUNK];
        for _ in 0..BYTES / CHUNK {
            stream.write_all(&buffer)?;
        }
        Ok(())
    });
    let (mut stream, _) = listener.accept()?;
    let mut buffer = vec![0u8; CHUNK];
    let (started, mut received) = (Instant::now(), 0);
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            some => received += some,
        }
    }
    let taken = started.elapsed();
    sender.join().map_err(|_| anyhow::anyhow!("the loopback sender panicked"))??;
    Ok(rate(received, taken))
}

fn tls() -> Result<(f64, f64)> {
    let (mut client, mut server) = connections()?;
    let mut wire = Vec::with_capacity(2 * CHUNK);
    while client.is_handshaking() || server.is_handshaking() {
        while client.wants_write() {
            client.write_tls(&mut wire)?;
        }
        server.read_tls(&mut wire.as_slice())?;
        wire.clear();
        server.process_new_packets().context("TLS handshake")?;
        while server.wants_write() {
            server.write_tls(&mut wire)?;
        }
        if !wire.is_empty() {
            client.read_tls(&mut wire.as_slice())?;
            wire.clear();
            client.process_new_packets().context("TLS handshake")?;
        }
    }
    let plain = vec![7u8; CHUNK];
    let mut out = vec![0u8; CHUNK];
    let (mut encrypting, mut decrypting) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..BYTES / CHUNK {
        let started = Instant::now();
        let mut rest = plain.as_slice();
        while !rest.is_empty() {
            let taken = client.writer().write(rest)?;
            rest = &rest[taken..];
            while client.wants_write() {
                client.write_tls(&mut wire)?;
            }
        }
        encrypting += started.elapsed();
        let started = Instant::now();
        let (mut sealed, mut filled) = (wire.as_slice(), 0);
        while filled < CHUNK {
            server.read_tls(&mut sealed)?;
            server.process_new_packets()?;
            loop {
                match server.reader().read(&mut out[filled..]) {
                    Ok(0) => break,
                    Ok(some) => filled += some,
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        decrypting += started.elapsed();
        wire.clear();
    }
    Ok((rate(BYTES, encrypting), rate(BYTES, decrypting)))
}

fn tls_loopback() -> Result<f64> {
    let (client, server) = connections()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let sender = std::thread::spawn(move || -> std::io::Result<_> {
        let mut tls = rustls::StreamOwned::new(client, TcpStream::connect(address)?);
        let plain = vec![7u8; CHUNK];
        for _ in 0..BYTES / CHUNK {
            tls.write_all(&plain)?;
        }
        tls.flush()?;
        // Closed by whoever waits for this thread: with session tickets that nobody has read it would reset what is on its way.
        Ok(tls)
    });
    let (stream, _) = listener.accept()?;
    let mut tls = rustls::StreamOwned::new(server, stream);
    let mut buffer = vec![0u8; CHUNK];
    tls.read_exact(&mut buffer)?;
    let started = Instant::now();
    for _ in 1..BYTES / CHUNK {
        tls.read_exact(&mut buffer)?;
    }
    let taken = started.elapsed();
    drop(sender.join().map_err(|_| anyhow::anyhow!("the TLS sender panicked"))??);
    Ok(rate(BYTES - CHUNK, taken))
}
