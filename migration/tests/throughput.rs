//! How fast the engine is on this machine, beside what the machine can do. Not a test of anything: run it with
//! `cargo test --release -p migration --test throughput -- --ignored --nocapture`.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use migration::page::{digest, is_zero};
use migration::report::Outcome;
use migration::testing::{Authority, Pair, Workload, machines};
use migration::transport::stop::Stop;
use migration::transport::stream::TlsStream;
use migration::transport::tls::{Acceptor, Connector};

const TOTAL: usize = 1 << 30;
const BATCH: usize = 256 << 10;

/// CPU time of this thread: what a kernel costs, however many others want the processor.
fn thread_time() -> Duration {
    Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("the clock exists"))
}

fn process_time() -> Duration {
    Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).expect("the clock exists"))
}

fn gigabytes_per_second(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / 1e9 / time.as_secs_f64()
}

fn over(bytes: usize, mut work: impl FnMut()) -> f64 {
    let (start, cpu) = (Instant::now(), thread_time());
    for _ in 0..bytes / BATCH {
        work();
    }
    let cpu = gigabytes_per_second(bytes, thread_time() - cpu);
    println!(
        "    {:.2} GB/s by the clock, {cpu:.2} GB for each second of this thread",
        gigabytes_per_second(bytes, start.elapsed())
    );
    cpu
}

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let client = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
    let (server, _) = listener.accept().expect("a connection");
    for stream in [&client, &server] {
        migration::transport::tcp::configure(stream).expect("socket options");
    }
    (client, server)
}

fn plain_tcp() -> f64 {
    let (mut client, mut server) = sockets();
    let reader = std::thread::spawn(move || {
        let (mut buffer, mut total) = (vec![0; BATCH], 0);
        while total < TOTAL {
            total += server.read(&mut buffer).expect("bytes");
        }
    });
    let data = vec![1; BATCH];
    let rate = over(TOTAL, || client.write_all(&data).expect("bytes"));
    reader.join().expect("no panic");
    rate
}

/// One stream, both ends on this machine: encrypt, send, receive, decrypt.
fn tls_stream() -> f64 {
    let (client, server) = sockets();
    let authority = Authority::new();
    let acceptor = Acceptor::new(&authority.issue("b"), "a").expect("identity");
    let connector = Connector::new(&authority.issue("a"), "b").expect("identity");
    let limit = Duration::from_secs(5);
    let reader = std::thread::spawn(move || {
        let session = acceptor.session().expect("a session");
        let mut stream = TlsStream::handshake(session, server, Stop::default(), limit).expect("TLS");
        let (mut total, cpu) = (0, thread_time());
        while total < TOTAL {
            let count = stream.fill("reading").expect("bytes").len();
            stream.consume(count);
            total += count;
        }
        println!(
            "    receiver {:.2} GB for each second of its thread",
            gigabytes_per_second(total, thread_time() - cpu)
        );
        stream
    });
    let session = connector.session().expect("a session");
    let mut stream = TlsStream::handshake(session, client, Stop::default(), limit).expect("TLS");
    let data = vec![1; BATCH];
    let rate = over(TOTAL, || {
        stream.queue(&data).expect("queued");
        stream.flush().expect("sent");
    });
    drop(reader.join().expect("no panic"));
    rate
}

fn migrate(streams: u16, workload: &Workload) {
    let pages = (TOTAL / 4096) as u64;
    let (_, source, destination) = machines(pages, &[]);
    source.boot(workload.clone());
    let mut pair = Pair::new();
    pair.source_options.limits.streams = streams;
    let (start, cpu) = (Instant::now(), process_time());
    let (report, received) = pair.run(&source, &destination);
    let (all, cpu) = (start.elapsed(), process_time() - cpu);
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    assert!(received.expect("it arrived").warning.is_none());
    let first = &report.rounds[0];
    let down = &report.downtime_ms;
    println!(
        "{streams} stream(s), {:>3} MiB/s dirtied: round 0 {:.2} GB/s ({:.0} MB in {:.0} ms), {} rounds, total {:.0} ms, with verification {:.0} ms, {:.0} ms of CPU; \
         downtime {:.2} ms = pause {:.2} + pages {:.2} + state {:.2} + commit {:.2} + resume {:.2}",
        (workload.pages_per_ms * 4096 * 1000) >> 20,
        first.bytes as f64 / 1e6 / first.ms,
        first.bytes as f64 / 1e6,
        first.ms,
        report.rounds.len(),
        report.total_ms,
        all.as_secs_f64() * 1e3,
        cpu.as_secs_f64() * 1e3,
        down.total,
        down.pause,
        down.final_pages,
        down.state,
        down.commit,
        down.resume,
    );
}

#[test]
#[ignore = "a measurement"]
fn throughput() {
    let (source, mut target) = (vec![7u8; BATCH], vec![0u8; BATCH]);
    let mut sum = 0u64;
    println!("copy {BATCH} bytes in cache  {:>6.2} GB/s", over(TOTAL, || target.copy_from_slice(&source)));
    println!(
        "digest (xxh3) of pages      {:>6.2} GB/s",
        over(TOTAL, || {
            sum ^= source.chunks(4096).map(digest).fold(0, |a, b| a ^ b);
        })
    );
    let zeroes = vec![0u8; BATCH];
    println!(
        "zero test of zero pages     {:>6.2} GB/s",
        over(TOTAL, || {
            sum += zeroes.chunks(4096).filter(|page| is_zero(page)).count() as u64;
        })
    );
    println!("loopback TCP, plain         {:>6.2} GB/s", plain_tcp());
    println!("loopback TCP, one TLS       {:>6.2} GB/s", tls_stream());
    let filled = Workload { filled_pages: (TOTAL / 2 / 4096) as u64, ..Workload::default() };
    for streams in [1, 1, 1, 2] {
        migrate(streams, &filled);
    }
    let busy = Workload { filled_pages: 28 << 10, sweep_pages: 100 << 8, pages_per_ms: 26, ..Workload::default() };
    migrate(1, &busy);
    migrate(1, &Workload { pages_per_ms: 128, ..busy });
    assert_ne!(sum, 1);
}
