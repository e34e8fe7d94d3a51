//! Ctrl-C leaves nothing behind, whenever it comes.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hostd::lab::{binary, sweep};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::{Need, ready};

/// How long the demo may take to end after the signal.
const DEADLINE: Duration = Duration::from_secs(60);

fn start() -> Child {
    Command::new(binary("headroom").unwrap()).arg("demo").stdout(Stdio::piped()).spawn().unwrap()
}

/// Sends the signal and waits for the end; then nothing of the demo may be left.
fn interrupt(mut child: Child, signal: Signal, when: &str) {
    let pid = child.id();
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
    let start = Instant::now();
    // Read to the end, so that it never waits for us.
    let output = child.stdout.take().map(|output| std::io::read_to_string(output).unwrap_or_default());
    let status = child.wait().unwrap();
    assert!(start.elapsed() < DEADLINE, "{when}: took {:?}", start.elapsed());
    assert_eq!(status.code(), Some(130), "{when}: {status}\n{output:?}");
    assert_eq!(sweep::leftovers(&sweep::process_prefix(pid)), Vec::<String>::new(), "{when}");
}

/// Reads the demo's lines until one contains `text`.
fn wait_for_line(child: &mut Child, text: &str) {
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    loop {
        line.clear();
        let count = output.read_line(&mut line).unwrap();
        assert!(count > 0, "the demo ended before it said `{text}`");
        if line.contains(text) {
            break;
        }
    }
    child.stdout = Some(output.into_inner());
}

/// Waits until something of the demo exists, or until it has `count` objects.
fn wait_for_objects(child: &Child, count: usize) {
    let (prefix, start) = (sweep::process_prefix(child.id()), Instant::now());
    while sweep::leftovers(&prefix).len() < count {
        assert!(start.elapsed() < DEADLINE, "the demo made no {count} objects");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn while_hosts_and_machines_are_made() {
    if !ready(Need::Kvm) {
        return;
    }
    // From the first namespace to running machines.
    for objects in [1, 4, 8, 11, 14, 17] {
        let child = start();
        wait_for_objects(&child, objects);
        interrupt(child, Signal::SIGINT, &format!("with {objects} objects"));
    }
}

#[test]
fn while_the_load_runs() {
    if !ready(Need::Kvm) {
        return;
    }
    let mut child = start();
    wait_for_line(&mut child, "| a cpu");
    interrupt(child, Signal::SIGTERM, "under load");
}

#[test]
fn in_the_middle_of_a_migration() {
    if !ready(Need::Kvm) {
        return;
    }
    let mut child = start();
    wait_for_line(&mut child, "memory and disk are on their way");
    interrupt(child, Signal::SIGINT, "in a migration");
}

#[test]
fn a_killed_demo_is_cleaned_up_by_the_next_one() {
    if !ready(Need::Kvm) {
        return;
    }
    let mut child = start();
    wait_for_objects(&child, 14);
    child.kill().unwrap();
    child.wait().unwrap();
    let killed = sweep::process_prefix(child.id());
    assert!(!sweep::leftovers(&killed).is_empty());
    let next = start();
    wait_for_objects(&next, 4);
    assert_eq!(sweep::leftovers(&killed), Vec::<String>::new());
    interrupt(next, Signal::SIGINT, "after a killed one");
}
