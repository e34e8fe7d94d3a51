//! Namespaces, links and quotas.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use hostd::lab::{HostSpec, Lab};
use tests::{Need, ready};

const DEADLINE: Duration = Duration::from_secs(5);

fn can_connect(lab: &Lab, from: &str, to: &str, timeout: Duration) -> bool {
    let to = lab.host(to).unwrap();
    let address = (to.address(), 4000).into();
    let _listener = to.namespace().run(|| TcpListener::bind(address)).unwrap().unwrap();
    lab.host(from).unwrap().namespace().run(|| TcpStream::connect_timeout(&address, timeout).is_ok()).unwrap()
}

#[test]
fn hosts_reach_each_other_and_a_cut_cable_separates_them() {
    if !ready(Need::Root) {
        return;
    }
    let lab = Lab::new(&[HostSpec::new("a1", "a"), HostSpec::new("b1", "b")]).unwrap();
    assert!(can_connect(&lab, "a1", "b1", DEADLINE));
    lab.fabric().set_link("b1", false).unwrap();
    assert!(!can_connect(&lab, "a1", "b1", Duration::from_millis(300)));
    lab.fabric().set_link("b1", true).unwrap();
    assert!(can_connect(&lab, "a1", "b1", DEADLINE));
}

#[test]
fn two_labs_with_the_same_addresses_do_not_meet() {
    if !ready(Need::Root) {
        return;
    }
    let one = Lab::new(&[HostSpec::new("a1", "a")]).unwrap();
    let two = Lab::new(&[HostSpec::new("a1", "a")]).unwrap();
    let address = one.hosts()[0].address();
    assert_eq!(address, two.hosts()[0].address());
    let _listener = one.hosts()[0].namespace().run(|| TcpListener::bind((address, 4000))).unwrap().unwrap();
    let reach = |lab: &Lab| {
        let target = (address, 4000).into();
        lab.observer().run(|| TcpStream::connect_timeout(&target, DEADLINE).is_ok()).unwrap()
    };
    assert!(reach(&one));
    assert!(!reach(&two));
}

#[test]
fn a_shaped_link_carries_no_more_than_its_rate() {
    if !ready(Need::Root) {
        return;
    }
    let lab = Lab::new(&[HostSpec::new("a1", "a"), HostSpec::new("b1", "b")]).unwrap();
    let rate = 20_000_000;
    lab.fabric().shape("b1", Some(rate)).unwrap();
    let (bytes, to) = (10_000_000u64, lab.host("b1").unwrap());
    let address = (to.address(), 4000);
    let listener = to.namespace().run(|| TcpListener::bind(address)).unwrap().unwrap();
    let mut stream = lab.host("a1").unwrap().namespace().run(|| TcpStream::connect(address)).unwrap().unwrap();
    let sender = std::thread::spawn(move || {
        use std::io::Write;
        stream.write_all(&vec![7u8; usize::try_from(bytes).unwrap()]).unwrap();
    });
    let mut received = listener.accept().unwrap().0;
    let start = Instant::now();
    let count = std::io::copy(&mut received.by_ref().take(bytes), &mut std::io::sink()).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    sender.join().unwrap();
    assert_eq!(count, bytes);
    let expected = bytes as f64 / rate as f64;
    assert!(seconds > expected * 0.7, "10 MB at 20 MB/s took {seconds:.3} s: the link is not shaped");
    assert!(seconds < expected * 4.0, "10 MB at 20 MB/s took {seconds:.3} s: the link is slower than its rate");
}

#[test]
fn a_quota_holds() {
    if !ready(Need::Root) {
        return;
    }
    let lab = Lab::new(&[HostSpec::new("a1", "a").with_cpu_cores(0.25)]).unwrap();
    if let Some(reason) = lab.unlimited() {
        eprintln!("skipped: no CPU quotas on this machine: {reason}");
        return;
    }
    let mut command = lab.hosts()[0].command(Path::new("/bin/sh")).unwrap();
    // The shell ends itself: it counts as long as it may.
    command.args(["-c", "while :; do :; done"]).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let ticks = processor_ticks(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    // 100 ticks a second.
    assert!(ticks > 5 && ticks < 40, "a busy loop got {ticks} ticks in a second, a quota of 0.25 cores gives about 25");
    assert!(lab.hosts()[0].cgroup().unwrap().throttled().0 > 10);
}

/// User and system time in clock ticks, `proc(5)`.
fn processor_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = stat.rsplit_once(')').unwrap().1;
    after_name.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}

/// Words that `ip link` takes for something else unless it is told that they are names.
#[test]
fn hosts_may_have_names_that_ip_knows_as_words() {
    if !ready(Need::Root) {
        return;
    }
    let names = ["a", "up", "type", "dev"];
    let hosts: Vec<HostSpec> = names.iter().map(|name| HostSpec::new(name, "a")).collect();
    let lab = Lab::new(&hosts).unwrap();
    for (from, to) in [("a", "up"), ("up", "type"), ("type", "dev"), ("dev", "a")] {
        assert!(can_connect(&lab, from, to, DEADLINE), "{from} to {to}");
        lab.fabric().set_link(to, false).unwrap();
        assert!(!can_connect(&lab, from, to, Duration::from_millis(300)), "{from} to {to}");
        lab.fabric().set_link(to, true).unwrap();
    }
    lab.fabric().shape("a", Some(1_000_000)).unwrap();
    lab.fabric().shape("a", None).unwrap();
    lab.remove().unwrap();
}
