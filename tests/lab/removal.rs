//! Nothing is left behind: not after use, not after a failure, not after a crash.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use hostd::lab::{HostSpec, Lab, interrupt, sweep};
use tests::{Need, ready};

const DEADLINE: Duration = Duration::from_secs(5);

#[test]
fn a_dropped_lab_leaves_nothing_and_ends_its_processes() {
    if !ready(Need::Root) {
        return;
    }
    let lab = Lab::new(&[HostSpec::new("a1", "a"), HostSpec::new("a2", "a")]).unwrap();
    let prefix = lab.prefix().to_owned();
    // One that ignores polite requests, and one that has left its parent.
    let mut command = lab.hosts()[0].command(Path::new("/bin/sh")).unwrap();
    let mut child = command.args(["-c", "trap '' TERM INT HUP; sleep 1000 & wait; sleep 1000"]).spawn().unwrap();
    assert!(sweep::leftovers(&prefix).len() >= 6, "{:?}", sweep::leftovers(&prefix));
    drop(lab);
    assert_eq!(sweep::leftovers(&prefix), Vec::<String>::new());
    assert!(!child.wait().unwrap().success());
}

#[test]
fn a_lab_that_cannot_be_built_leaves_nothing() {
    if !ready(Need::Root) {
        return;
    }
    // The second host has the name of the first one.
    let before = sweep::leftovers(&sweep::process_prefix(std::process::id()));
    let error = Lab::new(&[HostSpec::new("a1", "a"), HostSpec::new("a1", "a")]).err().unwrap();
    assert!(error.to_string().contains("ip"), "{error}");
    let after = sweep::leftovers(&sweep::process_prefix(std::process::id()));
    // Other tests of this process may have made or removed labs of their own meanwhile: only names that end in what this
    // test made count.
    let twins = |found: &[String]| found.iter().filter(|name| name.ends_with("-a1") && !before.contains(name)).count();
    assert!(twins(&after) <= 4, "{after:?}");
}

#[test]
fn the_next_start_removes_what_a_crashed_process_left() {
    if !ready(Need::Root) {
        return;
    }
    // A process that is gone: its number cannot be in use while it has not been waited for, and is free afterwards.
    let mut child = Command::new("/bin/true").stdout(Stdio::null()).spawn().unwrap();
    let pid = child.id();
    child.wait().unwrap();
    let prefix = sweep::process_prefix(pid);
    let name = format!("{prefix}1-a1");
    assert!(Command::new("ip").args(["netns", "add", &name]).status().unwrap().success());
    let mut orphan = Command::new("ip").args(["netns", "exec", &name, "sleep", "1000"]).spawn().unwrap();
    interrupt::poll("the orphan in its namespace", DEADLINE, Duration::from_millis(5), || {
        let inside = sweep::leftovers(&prefix).iter().any(|what| what.contains("(sleep)"));
        Ok(inside.then_some(()))
    })
    .unwrap();
    let directory = std::env::temp_dir().join(format!("{prefix}1-files"));
    std::fs::create_dir(&directory).unwrap();
    let lab = Lab::new(&[HostSpec::new("a1", "a")]).unwrap();
    assert_eq!(sweep::leftovers(&prefix), Vec::<String>::new());
    assert!(!orphan.wait().unwrap().success());
    assert!(!directory.exists());
    lab.remove().unwrap();
}
