//! What a daemon and its host hold: it must not grow with the number of migrations.

use std::fs::read_dir;
use std::path::Path;

use hostd::lab::LabHost;

/// One look at a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Descriptors of the daemon.
    pub descriptors: usize,
    /// Threads of the daemon.
    pub threads: usize,
    /// Resident memory of the daemon, in KiB.
    pub resident_kib: usize,
    /// Files below its run folder and its state folder.
    pub files: usize,
    /// Network interfaces in its namespace.
    pub interfaces: usize,
    /// Processes that it started and that live.
    pub children: usize,
}

impl Held {
    /// By `host` now.
    pub fn by(host: &LabHost) -> Self {
        let pid = host.daemon_pid().expect("a daemon that runs");
        let proc = |part: &str| format!("/proc/{pid}/{part}");
        let status = std::fs::read_to_string(proc("status")).expect("its status");
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field of the status");
            value.trim().trim_end_matches("kB").trim().parse().expect("a number")
        };
        let children: String = read_dir(proc("task"))
            .expect("its threads")
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
            .collect();
        let interfaces = || read_dir("/sys/class/net").map_or(0, Iterator::count);
        let links = || {
            std::fs::read_to_string("/proc/thread-self/net/dev")
                .map_or_else(|_| interfaces(), |text| text.lines().count())
        };
        Self {
            descriptors: read_dir(proc("fd")).expect("its descriptors").count(),
            threads: field("Threads:"),
            resident_kib: field("VmRSS:"),
            files: files(&host.directory().join("run")) + files(&host.directory().join("state")),
            interfaces: host.namespace().run(links).expect("its namespace"),
            children: children.split_whitespace().count(),
        }
    }

    /// What has grown from `before` to this by more than it may.
    pub fn grown(&self, before: &Self) -> Vec<String> {
        // Threads of tokio's pool for blocking calls come and go (they live for ten seconds), and so do connections to peers.
        let allowed = [
            ("descriptors", before.descriptors, self.descriptors, 8),
            ("threads", before.threads, self.threads, 16),
            ("files", before.files, self.files, 0),
            ("interfaces", before.interfaces, self.interfaces, 0),
            ("children", before.children, self.children, 0),
            ("resident_kib", before.resident_kib, self.resident_kib, before.resident_kib / 4 + 8 * 1024),
        ];
        let grew = allowed.into_iter().filter(|(_, before, after, slack)| after > &(before + slack));
        grew.map(|(what, before, after, _)| format!("{what}: {before}, then {after}")).collect()
    }
}

fn files(folder: &Path) -> usize {
    let Ok(entries) = read_dir(folder) else { return 0 };
    let count = |entry: std::fs::DirEntry| {
        if entry.path().is_dir() { files(&entry.path()) } else { 1 }
    };
    entries.flatten().map(count).sum()
}
