//! The VMM process of a machine: started here, or found again after a restart of hostd.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::process::{ChildStdin, Command};
use tokio::sync::watch;

/// A process, beyond doubt: pids are used again, a pid together with its start time is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Start in clock ticks since boot (field 22 of `/proc/PID/stat`, proc(5)).
    pub start_ticks: u64,
}

impl ProcessId {
    /// The process that has this pid now, and whether it has ended and only waits to be reaped.
    fn look(pid: u32) -> io::Result<(Self, bool)> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The command's name stands in parentheses and may contain anything, spaces and parentheses too.
        let after = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace());
        let field = |number: usize| after.clone().and_then(|mut fields| fields.nth(number - 3));
        let start = field(22).and_then(|start| start.parse().ok());
        let start_ticks = start.ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not as expected")))?;
        Ok((Self { pid, start_ticks }, field(3) == Some("Z")))
    }
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// In words that follow `it`.
    Ended(String),
    /// The kernel killed it for a system call that a VMM never makes (SIGSYS, `vmm::sandbox`).
    ForbiddenCall,
}

impl End {
    fn of(status: ExitStatus) -> Self {
        if status.signal() == Some(libc::SIGSYS) {
            Self::ForbiddenCall
        } else {
            Self::Ended(format!("ended with {status}"))
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended(how) => formatter.write_str(how),
            Self::ForbiddenCall => formatter.write_str(
                "was killed by the kernel for a system call that a VMM never makes (SIGSYS): its guest may have broken into it",
            ),
        }
    }
}

/// What to start.
#[derive(Debug)]
pub struct Program {
    /// Executable.
    pub path: PathBuf,
    /// Arguments.
    pub arguments: Vec<std::ffi::OsString>,
    /// Where standard output and error go; appended.
    pub log: PathBuf,
    /// Descriptors that the process gets, under the numbers that they have here.
    pub descriptors: Vec<OwnedFd>,
}

/// A running process whose end is noticed.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: OwnedFd,
    ended: watch::Receiver<Option<End>>,
}

impl Process {
    /// Starts `program` in a process group of its own: a Ctrl-C on hostd's terminal is not meant for its machines. Also returns its
    /// standard input, which ends when hostd does.
    ///
    /// # Errors
    ///
    /// If it cannot be executed.
    pub fn spawn(program: Program) -> io::Result<(Self, ChildStdin)> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&program.log)?;
        let mut command = Command::new(&program.path);
        command
            .args(&program.arguments)
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .kill_on_drop(false);
        let numbers: Vec<RawFd> = program.descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: the closure runs between fork and exec and calls only fcntl, which is async-signal-safe. It allocates
        // nothing: `numbers` was made before the fork.
        unsafe { command.pre_exec(move || numbers.iter().try_for_each(|number| keep_open(*number))) };
        let mut child = command.spawn()?;
        drop(program.descriptors);
        let early = || io::Error::other("the process ended at once");
        let (pid, input) = (child.id().ok_or_else(early)?, child.stdin.take().ok_or_else(early)?);
        // It may have ended already; it is not reaped before it is waited for below, so the pid is still its own.
        let (id, _) = ProcessId::look(pid)?;
        let pidfd = open_pidfd(pid)?;
        let (sender, ended) = watch::channel(None);
        tokio::spawn(async move {
            let how = match child.wait().await {
                Ok(status) => End::of(status),
                Err(error) => End::Ended(format!("was lost: {error}")),
            };
            sender.send_replace(Some(how));
        });
        Ok((Self { id, pidfd, ended }, input))
    }

    /// Finds a process again that an earlier hostd started.
    ///
    /// # Errors
    ///
    /// If it has ended, or its pid belongs to another process by now.
    pub fn adopt(id: ProcessId) -> io::Result<Self> {
        let pidfd = open_pidfd(id.pid)?;
        // The descriptor is open: from here on the pid cannot be used again behind our back.
        if ProcessId::look(id.pid)? != (id, false) {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the process has ended"));
        }
        // SAFETY: the descriptor belongs to the `AsyncFd` alone, and nothing else closes it while it is registered.
        let waiter = unsafe { AsyncFd::register(pidfd.try_clone()?) }?;
        let (sender, ended) = watch::channel(None);
        tokio::spawn(async move {
            // A pidfd becomes readable when its process ends (pidfd_open(2)). How it ended is told to its parent only.
            let _ = waiter.readable().await;
            sender.send_replace(Some(End::Ended("ended".to_owned())));
        });
        Ok(Self { id, pidfd, ended })
    }

    /// Which process.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// How it ended, if it did.
    pub fn ended(&self) -> Option<End> {
        self.ended.borrow().clone()
    }

    /// A receiver that changes once, when the process ends.
    pub fn watch(&self) -> watch::Receiver<Option<End>> {
        self.ended.clone()
    }

    /// Ends it at once.
    pub fn kill(&self) {
        // SAFETY: pidfd_send_signal(2) with an open pidfd, no siginfo and no flags.
        let result = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.pidfd.as_raw_fd(), libc::SIGKILL, std::ptr::null::<()>(), 0)
        };
        if result < 0 {
            tracing::debug!(pid = self.id.pid, error = %io::Error::last_os_error(), "not killed");
        }
    }
}

/// Waits for the end of a process; `None` if it did not end in time.
pub async fn wait_end(mut watch: watch::Receiver<Option<End>>, patience: Duration) -> Option<End> {
    let ended = tokio::time::timeout(patience, watch.wait_for(Option::is_some)).await;
    match ended {
        Ok(Ok(how)) => how.clone(),
        Ok(Err(_)) => Some(End::Ended("ended".to_owned())),
        Err(_) => None,
    }
}

/// Has the program that is executed next inherit a descriptor. It keeps its number: moving it could close another one that is still
/// needed, and which numbers are free is not known.
fn keep_open(number: RawFd) -> io::Result<()> {
    // SAFETY: takes two integers, and the result is checked.
    if unsafe { libc::fcntl(number, libc::F_SETFD, 0) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers; the result is checked.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The last `lines` lines of a log, on one line, bounded to 2,000 bytes; empty if there is none.
pub fn log_tail(path: &Path, lines: usize) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(2000)))?;
        let mut bytes = Vec::new();
        file.take(2000).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let last: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    last[last.len().saturating_sub(lines)..].join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(folder: &Path, script: &str) -> Program {
        Program {
            path: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            log: folder.join("log"),
            descriptors: Vec::new(),
        }
    }

    #[tokio::test]
    async fn the_end_of_a_process_is_noticed_with_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let (process, _input) =
            Process::spawn(program(folder.path(), "echo cannot open the disk >&2; exit 3")).unwrap();
        let how = wait_end(process.watch(), Duration::from_secs(10)).await.unwrap();
        assert!(how.to_string().contains('3'), "{how}");
        assert_eq!(log_tail(&folder.path().join("log"), 2), "cannot open the disk");
    }

    #[tokio::test]
    async fn a_forbidden_call_is_told_from_other_ends() {
        let folder = tempfile::tempdir().unwrap();
        for (signal, expected) in [("SYS", true), ("KILL", false)] {
            let (process, _input) = Process::spawn(program(folder.path(), &format!("kill -{signal} $$"))).unwrap();
            let end = wait_end(process.watch(), Duration::from_secs(10)).await.unwrap();
            assert_eq!(end == End::ForbiddenCall, expected, "{end}");
        }
    }

    #[tokio::test]
    async fn a_process_is_found_again_and_can_be_killed() {
        let folder = tempfile::tempdir().unwrap();
        let (process, _input) = Process::spawn(program(folder.path(), "exec sleep 600")).unwrap();
        let adopted = Process::adopt(process.id()).unwrap();
        assert_eq!(adopted.ended(), None);
        adopted.kill();
        assert!(wait_end(adopted.watch(), Duration::from_secs(10)).await.is_some());
        assert!(wait_end(process.watch(), Duration::from_secs(10)).await.is_some());
        assert!(Process::adopt(process.id()).is_err());
        let other = ProcessId { pid: std::process::id(), start_ticks: 1 };
        assert!(Process::adopt(other).is_err(), "a pid alone is not enough");
    }

    /// Two cards of a machine, in a daemon that has many files open.
    #[tokio::test]
    async fn each_descriptor_arrives_whatever_their_numbers_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let at = |name: &str, number: RawFd| {
            let file = std::fs::File::create(path(name)).unwrap();
            // SAFETY: F_DUPFD_CLOEXEC makes a descriptor that belongs to nobody else.
            unsafe { OwnedFd::from_raw_fd(libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number)) }
        };
        let (first, second) = (at("first", 199), at("second", 200));
        let script = format!("echo one >&{}; echo two >&{}", first.as_raw_fd(), second.as_raw_fd());
        let mut program = program(folder.path(), &script);
        program.path = "/bin/bash".into();
        program.descriptors = vec![first, second];
        let (process, _input) = Process::spawn(program).unwrap();
        wait_end(process.watch(), Duration::from_secs(10)).await.unwrap();
        let written = ["first", "second"].map(|name| std::fs::read_to_string(path(name)).unwrap());
        assert_eq!(written, ["one\n", "two\n"]);
    }
}
