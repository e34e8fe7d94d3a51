//! The observer against an ordinary echo server: what it reports is what was done to the link.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use hostd::demo::observer::{Observer, Target};
use hostd::lab::{HostSpec, Lab, interrupt};
use tests::{Need, ready};

/// UDP and TCP echo on port 7 of a host, for as long as the process lives.
fn serve_echo(lab: &Lab, host: &str) -> Ipv4Addr {
    let host = lab.host(host).unwrap();
    let address = host.address();
    let (udp, tcp) = host
        .namespace()
        .run(|| (UdpSocket::bind((address, 7)).unwrap(), TcpListener::bind((address, 7)).unwrap()))
        .unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0u8; 2048];
        while let Ok((count, from)) = udp.recv_from(&mut buffer) {
            let _ = udp.send_to(&buffer[..count], from);
        }
    });
    std::thread::spawn(move || {
        for mut stream in tcp.incoming().flatten() {
            std::thread::spawn(move || {
                let mut buffer = [0u8; 2048];
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..count]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

fn observe(lab: &Lab, udp: u32, tcp: u32) -> Observer {
    let address = serve_echo(lab, "a1");
    let target = Target { name: "echo".into(), address, udp_per_second: udp, tcp_per_second: tcp };
    Observer::start(lab.observer(), vec![target]).unwrap()
}

fn pass(observer: &Observer, time: Duration) -> std::ops::Range<u64> {
    let start = observer.now();
    interrupt::wait_until(Instant::now() + time).unwrap();
    start..observer.now()
}

fn wait_answered(observer: &Observer, window: &std::ops::Range<u64>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let summary = observer.udp("echo", window.clone()).unwrap();
        if summary.answered == summary.sent {
            return;
        }
        assert!(Instant::now() < deadline, "{summary:?}");
        interrupt::wait_until(Instant::now() + Duration::from_millis(1)).unwrap();
    }
}

#[test]
fn a_cut_of_forty_milliseconds_is_seen_as_such() {
    if !ready(Need::Root) {
        return;
    }
    let lab = Lab::new(&[HostSpec::new("a1", "a")]).unwrap();
    let observer = observe(&lab, 1000, 100);
    let before = pass(&observer, Duration::from_millis(500));
    // What is still on its way when the cable is cut would be lost with it.
    wait_answered(&observer, &before);
    let start = observer.now();
    lab.fabric().set_link("a1", false).unwrap();
    let down = Instant::now();
    std::thread::sleep(Duration::from_millis(40));
    let cut_at_least = down.elapsed();
    lab.fabric().set_link("a1", true).unwrap();
    pass(&observer, Duration::from_millis(1500));
    let window = start..observer.now();
    let (quiet, cut) = (observer.udp("echo", before).unwrap(), observer.udp("echo", window).unwrap());
    assert!(quiet.sent >= 450 && quiet.sent <= 550, "1,000 a second: {quiet:?}");
    assert_eq!(quiet.lost, 0, "{quiet:?}");
    assert!(cut.gap_ms >= cut_at_least.as_secs_f64() * 1e3, "{cut:?}, cut for at least {cut_at_least:?}");
    assert!(cut.gap_ms < 500.0, "{cut:?}");
    // Every request of the silence is lost, and no other.
    assert!(cut.lost as f64 > cut.gap_ms * 0.7 && (cut.lost as f64) < cut.gap_ms * 1.3 + 5.0, "{cut:?}");
    let tcp = observer.tcp("echo").unwrap();
    assert!(tcp.alive() && tcp.messages > 100, "{tcp:?}");
    assert!(tcp.longest_silence_ms >= 20.0, "{tcp:?}");
}

#[test]
fn the_pace_can_be_changed_while_running() {
    if !ready(Need::Root) {
        return;
    }
    let lab = Lab::new(&[HostSpec::new("a1", "a")]).unwrap();
    let observer = observe(&lab, 20, 0);
    let slow = pass(&observer, Duration::from_millis(500));
    observer.set_rates("echo", 1000, 50);
    let fast = pass(&observer, Duration::from_millis(500));
    let (slow, fast) = (observer.udp("echo", slow).unwrap(), observer.udp("echo", fast).unwrap());
    assert!(slow.sent >= 8 && slow.sent <= 12, "{slow:?}");
    assert!(fast.sent >= 450 && fast.sent <= 550, "{fast:?}");
    observer.set_rates("echo", 0, 0);
    pass(&observer, Duration::from_millis(300));
    let tcp = observer.tcp("echo").unwrap();
    assert!(tcp.complete() && tcp.messages >= 20, "{tcp:?}");
}
