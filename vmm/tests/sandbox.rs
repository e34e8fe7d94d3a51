//! What the kernel says of the threads of a VMM whose guest works: their privileges and filters.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use common::{Lab, Vmm, guest, ready, until};

const WORKLOAD: &str = "ip=10.0.0.2/24 sweep=8:100 disk=8:8 cpu=5 fill=16 hb=100";
const PATIENCE: Duration = Duration::from_secs(60);

/// capabilities(7).
const DAC_OVERRIDE: u64 = 1 << 1;
const NET_ADMIN: u64 = 1 << 12;
const IPC_LOCK: u64 = 1 << 14;
const SYS_PTRACE: u64 = 1 << 19;
const SYS_NICE: u64 = 1 << 23;
const SYS_RESOURCE: u64 = 1 << 24;

/// One thread, by `/proc/PID/task/TID/status`.
#[derive(Debug, PartialEq, Eq)]
struct Confined {
    no_new_privs: u64,
    filters: u64,
    effective: u64,
    permitted: u64,
    bounding: u64,
}

/// The threads by their names. Those of the kernel's that work for the process, such as io_uring's, have the filters of their makers.
fn threads(vmm: &Vmm) -> BTreeMap<String, Confined> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vmm.child.id())).expect("its threads");
    let read = |task: std::io::Result<std::fs::DirEntry>| {
        let status = std::fs::read_to_string(task.ok()?.path().join("status")).ok()?;
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect(name);
            value.trim().to_owned()
        };
        let number = |name| field(name).parse::<u64>().expect("a number");
        let set = |name| u64::from_str_radix(&field(name), 16).expect("a set");
        let confined = Confined {
            no_new_privs: number("NoNewPrivs"),
            filters: number("Seccomp_filters"),
            effective: set("CapEff"),
            permitted: set("CapPrm"),
            bounding: set("CapBnd"),
        };
        assert_eq!(number("Seccomp"), if confined.filters > 0 { 2 } else { 0 });
        Some((field("Name"), confined))
    };
    tasks.filter_map(read).collect()
}

fn own_capabilities() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("its own status");
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("a set");
    u64::from_str_radix(set.trim(), 16).expect("a set")
}

fn working(lab: &Lab, arguments: &[&str]) -> Vmm {
    let disk = lab.disk("disk0", 16);
    let mut config = lab.config(64, WORKLOAD, "tap0", &disk);
    config["balloon"] = serde_json::json!({});
    let vmm = lab.vmm("vmm", &config, arguments);
    let mut guest = guest();
    until("work", PATIENCE, || guest.status().ok().filter(|now| now.sweep_step > 2 && now.disk_sequence > 2));
    vmm
}

#[test]
fn each_thread_of_a_working_machine_is_confined() {
    if !ready("each_thread_of_a_working_machine_is_confined") {
        return;
    }
    let lab = Lab::new();
    lab.tap("tap0");
    let vmm = working(&lab, &[]);
    // The tap is attached by its name, which is why it may administer networks.
    let ptrace = if Path::new("/dev/userfaultfd").exists() { 0 } else { SYS_PTRACE };
    // Without that, this test's process and the VMM cannot raise the limit for niceness.
    let nice = if own_capabilities() & SYS_RESOURCE != 0 { 0 } else { SYS_NICE };
    let few = DAC_OVERRIDE | IPC_LOCK | NET_ADMIN | ptrace | nice;
    let threads = threads(&vmm);
    let process = Confined { no_new_privs: 1, filters: 2, effective: few, permitted: few, bounding: 0 };
    for name in ["headroom-vmm", "api"] {
        assert_eq!(threads[name], process, "{name}");
    }
    let serving = Confined { filters: 3, effective: 0, permitted: 0, ..process };
    for name in ["vcpu0", "disk0", "net0", "virtio-balloon"] {
        assert_eq!(threads[name], serving, "{name}");
    }
    for (name, thread) in &threads {
        assert!(thread.no_new_privs == 1 && thread.filters >= 2 && thread.effective & !few == 0, "{name}: {thread:?}");
    }
    assert_eq!(vmm.quit(), Some(0));
}

/// Also where the API, whoever uses it, asks for more.
#[test]
fn a_machine_reaches_no_file_but_those_it_was_allowed() {
    if !ready("a_machine_reaches_no_file_but_those_it_was_allowed") {
        return;
    }
    let (lab, outside) = (Lab::new(), tempfile::tempdir().expect("a directory"));
    lab.tap("tap0");
    let allowed = lab.directory.path().display().to_string();
    let vmm = working(&lab, &["--allow-path", &allowed]);
    vmm.client.pause().expect("paused");
    let refused = vmm.client.save(outside.path().join("snapshot")).expect_err("it is out of reach");
    assert!(refused.to_string().contains("Permission denied"), "{refused}");
    assert_eq!(std::fs::read_dir(outside.path()).expect("a directory").count(), 0);
    vmm.client.save(lab.directory.path().join("snapshot")).expect("saved");
    vmm.client.resume().expect("it runs on");
    let mut guest = guest();
    let before = guest.status().expect("an answer").disk_sequence;
    until("more work", PATIENCE, || guest.status().ok().filter(|now| now.disk_sequence > before));
    assert_eq!(vmm.quit(), Some(0));
}

#[test]
fn nothing_is_confined_where_that_is_asked_for() {
    if !ready("nothing_is_confined_where_that_is_asked_for") {
        return;
    }
    let lab = Lab::new();
    lab.tap("tap0");
    let vmm = working(&lab, &["--no-sandbox"]);
    for (name, thread) in threads(&vmm) {
        assert!(thread.filters == 0 && thread.no_new_privs == 0 && thread.effective & NET_ADMIN != 0, "{name}");
    }
    assert_eq!(vmm.quit(), Some(0));
}
