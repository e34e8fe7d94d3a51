//! Removal of everything a lab made, found by name alone: by its own `Drop`, after Ctrl-C, and by the next run after a crash.
//!
//! Every namespace, control group and directory of a lab begins with `hr-<pid>-<number>-`, where `pid` is the process that
//! made it. Processes are found through them: whoever is in such a group or namespace belongs to the lab. Links, bridges
//! and taps live inside the namespaces and vanish with them.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::cgroup::Controller;
use super::error::{LabError, LabResult};
use super::namespace;

/// How long killed processes may take to end.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Prefix of all labs of the process `pid`.
pub fn process_prefix(pid: u32) -> String {
    format!("hr-{pid}-")
}

/// Directories whose names begin with `prefix`.
fn directories(prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else { return Vec::new() };
    let named = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(|n| n.starts_with(prefix));
    entries.flatten().map(|entry| entry.path()).filter(named).collect()
}

/// Processes in the lab's groups and namespaces, without this one.
fn processes(prefix: &str) -> Vec<i32> {
    let groups = Controller::find().map(|controller| controller.list(prefix)).unwrap_or_default();
    let mut pids: Vec<i32> = groups.iter().flat_map(super::cgroup::Cgroup::processes).collect();
    pids.extend(namespace::list(prefix).iter().flat_map(|name| namespace::processes(name)));
    pids.sort_unstable();
    pids.dedup();
    pids.retain(|pid| u32::try_from(*pid) != Ok(std::process::id()));
    pids
}

/// What exists under `prefix`, in words; empty if nothing does.
pub fn leftovers(prefix: &str) -> Vec<String> {
    let mut found: Vec<String> = processes(prefix)
        .into_iter()
        .map(|pid| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("process {pid} ({})", name.trim())
        })
        .collect();
    found.extend(namespace::list(prefix).into_iter().map(|name| format!("namespace {name}")));
    let groups = Controller::find().map(|controller| controller.list(prefix)).unwrap_or_default();
    found.extend(groups.iter().map(|group| format!("control group {}", group.path().display())));
    found.extend(directories(prefix).into_iter().map(|path| format!("directory {}", path.display())));
    found
}

/// Ends all processes under `prefix` and removes all its objects. Removing what is not there is no error.
///
/// # Errors
/// [`LabError::Leftovers`] names what would not go.
pub fn remove(prefix: &str) -> LabResult<()> {
    let deadline = Instant::now() + KILL_DEADLINE;
    // A process may fork between the listing and the kill: until none is left.
    loop {
        let pids = processes(prefix);
        if pids.is_empty() || Instant::now() >= deadline {
            break;
        }
        kill(&pids, prefix, deadline);
    }
    for name in namespace::list(prefix) {
        // Another process may be removing the same stale lab.
        let _ = namespace::ip(&["netns", "del", &name]);
    }
    if let Ok(controller) = Controller::find() {
        for group in controller.list(prefix) {
            while group.remove().is_err() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
    for path in directories(prefix) {
        let _ = std::fs::remove_dir_all(path);
    }
    let rest = leftovers(prefix);
    if rest.is_empty() { Ok(()) } else { Err(LabError::Leftovers { prefix: prefix.to_owned(), what: rest.join(", ") }) }
}

/// Removes the labs of processes that are no more; returns their prefixes.
pub fn remove_stale() -> Vec<String> {
    let mut names = namespace::list("hr-");
    let groups = Controller::find().map(|controller| controller.list("hr-")).unwrap_or_default();
    let paths = groups.iter().map(|group| group.path().to_owned()).chain(directories("hr-"));
    names.extend(paths.filter_map(|path| path.file_name()?.to_str().map(str::to_owned)));
    let mut owners: Vec<u32> = names.iter().filter_map(|name| owner(name)).collect();
    owners.sort_unstable();
    owners.dedup();
    let dead = owners.into_iter().filter(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists());
    dead.map(process_prefix).filter(|prefix| remove(prefix).is_ok()).collect()
}

/// The process that made an object of this name.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix("hr-")?.split_once('-')?.0.parse().ok()
}

/// Sends SIGKILL through pidfds, so that a number that was given to another process meanwhile is not hit, and waits.
fn kill(pids: &[i32], prefix: &str, deadline: Instant) {
    let handles: Vec<(i32, OwnedFd)> = pids.iter().filter_map(|pid| Some((*pid, pidfd(*pid)?))).collect();
    let still = processes(prefix);
    for (_, handle) in handles.iter().filter(|(pid, _)| still.contains(pid)) {
        signal(handle);
    }
    for (_, handle) in &handles {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let _ = nix::poll::poll(&mut [PollFd::new(handle.as_fd(), PollFlags::POLLIN)], timeout);
    }
}

fn pidfd(pid: i32) -> Option<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn signal(handle: &OwnedFd) {
    use std::os::fd::AsRawFd;
    // SAFETY: pidfd_send_signal(2) with a null siginfo touches no memory of ours. A process that has ended already is no error.
    unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, handle.as_raw_fd(), libc::SIGKILL, std::ptr::null::<u8>(), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_read_from_names() {
        assert_eq!(owner("hr-4711-2-a1"), Some(4711));
        assert_eq!(owner("hr-x-2"), None);
        assert_eq!(owner("lab-4711-2"), None);
    }

    #[test]
    fn prefixes_of_different_processes_do_not_overlap() {
        assert!(!format!("{}1-a1", process_prefix(471)).starts_with(&process_prefix(47)));
    }
}
