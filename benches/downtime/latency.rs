//! What a page that a running guest waits for must cost at least: a bare userfaultfd fault, and a round trip over TLS.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use userfaultfd::{Event, UffdBuilder};

use crate::median::median;
use crate::session::connections;

const PAGE: usize = 4096;
const FAULTS: usize = 2000;
const TRIPS: usize = 2000;

/// Median time in microseconds from touching a missing page until going on, when another thread reads the fault and fills the
/// page with `UFFDIO_COPY`. `None` where this user may not use userfaultfd.
pub fn fault_us() -> Result<Option<f64>> {
    let Ok(uffd) = UffdBuilder::new().close_on_exec(true).user_mode_only(true).create() else { return Ok(None) };
    let bytes = FAULTS * PAGE;
    let length = bytes.try_into().context("no pages")?;
    // SAFETY: a new anonymous mapping that nothing else knows of.
    let area = unsafe { mmap_anonymous(None, length, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE) }?;
    uffd.register(area.as_ptr(), bytes)?;
    let start = area.as_ptr() as usize;
    let times = std::thread::scope(|scope| {
        let server = scope.spawn(|| -> Result<()> {
            let page = [7u8; PAGE];
            for _ in 0..FAULTS {
                if let Some(Event::Pagefault { addr, .. }) = uffd.read_event()? {
                    let target = addr as usize / PAGE * PAGE;
                    // SAFETY: the target is a page of the registered area, in which nothing is yet.
                    unsafe { uffd.copy(page.as_ptr().cast(), target as *mut _, PAGE, true) }?;
                }
            }
            Ok(())
        });
        let touch = |index: usize| {
            let begin = Instant::now();
            // SAFETY: the page lies in the mapping, which outlives this scope.
            std::hint::black_box(unsafe { std::ptr::read_volatile((start + index * PAGE) as *const u8) });
            begin.elapsed()
        };
        let times: Vec<Duration> = (0..FAULTS).map(touch).collect();
        server.join().map_err(|_| anyhow::anyhow!("the fault server panicked"))??;
        anyhow::Ok(times)
    })?;
    // SAFETY: nobody touches it any more.
    unsafe { munmap(area, bytes) }?;
    Ok(Some(median(times.iter().map(|time| time.as_secs_f64() * 1e6))))
}

/// Bytes per second that one thread puts into fresh memory with `UFFDIO_COPY`, in pieces as they come out of a TLS record. `None`
/// where this user may not use userfaultfd.
pub fn copy_bytes_per_second() -> Result<Option<f64>> {
    const BYTES: usize = 256 << 20;
    let Ok(uffd) = UffdBuilder::new().close_on_exec(true).user_mode_only(true).create() else { return Ok(None) };
    let length = BYTES.try_into().context("no bytes")?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new anonymous mapping that nothing else knows of.
    let area = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) }?;
    uffd.register(area.as_ptr(), BYTES)?;
    let piece = vec![7u8; 4 * PAGE];
    let begin = Instant::now();
    for offset in (0..BYTES).step_by(piece.len()) {
        let target = area.as_ptr() as usize + offset;
        // SAFETY: the target lies in the registered area, and nothing is there yet.
        unsafe { uffd.copy(piece.as_ptr().cast(), target as *mut _, piece.len(), false) }?;
    }
    let taken = begin.elapsed();
    // SAFETY: nobody touches it any more.
    unsafe { munmap(area, BYTES) }?;
    Ok(Some(BYTES as f64 / taken.as_secs_f64()))
}

/// Median time in microseconds of asking for a page with a few bytes and getting it, over TLS 1.3 on loopback.
pub fn round_trip_us() -> Result<f64> {
    let (client, server) = connections()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let answering = std::thread::spawn(move || -> Result<()> {
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut tls = rustls::StreamOwned::new(server, stream);
        let (mut ask, page) = ([0; 16], [7; PAGE]);
        for _ in 0..TRIPS {
            tls.read_exact(&mut ask)?;
            tls.write_all(&page)?;
            tls.flush()?;
        }
        Ok(())
    });
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut tls = rustls::StreamOwned::new(client, stream);
    let mut page = [0; PAGE];
    let mut times = Vec::with_capacity(TRIPS);
    for _ in 0..TRIPS {
        let begin = Instant::now();
        tls.write_all(&[1; 16])?;
        tls.flush()?;
        tls.read_exact(&mut page)?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    answering.join().map_err(|_| anyhow::anyhow!("the answering thread panicked"))??;
    Ok(median(times.into_iter()))
}
