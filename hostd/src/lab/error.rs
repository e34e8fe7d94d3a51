//! What can go wrong while hosts are built on one machine.

use std::path::PathBuf;
use std::time::Duration;

/// A failure of the lab, with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Only root may make network namespaces.
    #[error("the lab makes network namespaces, bridges and control groups, and that needs root: run this as root")]
    NotRoot,
    /// A tool is missing or could not be started.
    #[error("`{program}` could not be started (Debian's package iproute2 has ip and tc)")]
    Tool {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A tool reported a failure.
    #[error("`{command}` failed: {stderr}")]
    Command {
        /// The command line, or the batch that was fed to it.
        command: String,
        /// What it said.
        stderr: String,
    },
    /// A file, directory or kernel interface could not be used.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb: `create`, `open`, `write`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A namespace could not be entered.
    #[error("cannot enter network namespace {name}: it was removed, or this process lacks CAP_SYS_ADMIN")]
    Enter {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A program that ought to stand beside this one is not there.
    #[error("{} is missing: build it first (`cargo build --workspace --bins`)", path.display())]
    Binary {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A daemon ended or did not become ready.
    #[error("{program} on host {host} {what}; the end of its log {}:\n{log}", log_path.display())]
    Daemon {
        /// Program name.
        program: String,
        /// Host name.
        host: String,
        /// What happened.
        what: String,
        /// The log file.
        log_path: PathBuf,
        /// Its last lines.
        log: String,
    },
    /// A host name that is not part of this lab.
    #[error("this lab has no host {0}")]
    UnknownHost(String),
    /// An event did not happen in time.
    #[error("waited {waited:?} for {what}")]
    Deadline {
        /// The event.
        what: String,
        /// For how long.
        waited: Duration,
    },
    /// Certificates could not be made.
    #[error("cannot make the lab's certificates")]
    Certificates(#[from] crate::security::pki::PkiError),
    /// Processes or objects survived the removal.
    #[error("left behind after the removal of {prefix}: {what}")]
    Leftovers {
        /// Name prefix of the lab.
        prefix: String,
        /// The objects.
        what: String,
    },
    /// Ctrl-C or SIGTERM.
    #[error("interrupted")]
    Interrupted,
}

impl LabError {
    /// Adapter for `map_err` on I/O results.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

/// Result of a lab operation.
pub type LabResult<T> = Result<T, LabError>;
