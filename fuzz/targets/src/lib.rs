//! Bytes from outside: one function for each kind. None of them may panic, whatever it is given.
//!
//! `fuzz/fuzz_targets` hands them to libFuzzer; `tests/mutations.rs` calls them on any toolchain, with mutations of the seeds in
//! `fuzz/corpus`.

mod daemon;
mod wire;

pub use daemon::accepts;

/// A target by its name, which is also that of its folder in the corpus.
pub struct Target {
    /// Name.
    pub name: &'static str,
    /// Takes an input.
    pub run: fn(&[u8]),
    /// How many inputs the ordinary test gives it: fewer where each makes threads or files.
    pub rounds: usize,
}

/// All of them.
pub const TARGETS: [Target; 12] = [
    Target { name: "frame", run: wire::frame, rounds: 50_000 },
    Target { name: "message", run: wire::message, rounds: 50_000 },
    Target { name: "handshake", run: wire::handshake, rounds: 50_000 },
    Target { name: "missing", run: wire::missing, rounds: 50_000 },
    Target { name: "state", run: vmm::fuzzing::state, rounds: 50_000 },
    Target { name: "block_state", run: vmm::fuzzing::block_state, rounds: 2_000 },
    Target { name: "snapshot", run: vmm::fuzzing::snapshot, rounds: 10_000 },
    Target { name: "virtqueue", run: vmm::fuzzing::virtqueue, rounds: 50_000 },
    Target { name: "balloon", run: vmm::fuzzing::balloon, rounds: 20_000 },
    Target { name: "disk_request", run: vmm::fuzzing::disk_request, rounds: 50_000 },
    Target { name: "vmm_api", run: vmm::fuzzing::api, rounds: 50_000 },
    Target { name: "hostd_api", run: daemon::body, rounds: 50_000 },
];

/// Runs the target of that name.
///
/// # Panics
///
/// If there is none, or the target has found something.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of that name");
    (target.run)(data);
}
