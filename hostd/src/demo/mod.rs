//! `headroom demo`: the whole product in about a minute, on real machines.
//!
//! Three hosts in two pools, six machines with disks and networks. The load of pool `a` grows and an event is declared that
//! would take it over its capacity; the predictor sees that coming, the planner moves a machine to pool `b` in time, and an
//! observer outside watches that machine with 1,000 requests a second and a TCP connection. At the end every promise is
//! checked against what was measured ([`promise`]), and the recorded demand is replayed against a plain threshold
//! ([`reactive`]).
//!
//! ```text
//! stage ── builds ──► lab: hosts, daemons, machines
//! load  ── tells the guests what to do, asks how they are      (UDP 9000, from the observer's namespace)
//! feed  ── asks the daemons: pools, plans, migrations          (control sockets)
//! observer ── asks the machines: UDP and TCP echo              (port 7)
//! run   ── draws (screen), tells (story), sums up (report)
//! ```

pub mod feed;
pub mod load;
pub mod observer;
pub mod promise;
pub mod reactive;
pub mod report;
pub mod run;
pub mod scenario;
pub mod screen;
pub mod stage;
pub mod story;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::client::ClientError;
use crate::lab::{LabError, interrupt, sweep};
use report::DemoReport;
use screen::{Line, Screen, Style};

/// What is asked of the demo.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DemoOptions {
    /// Where to write the report.
    pub json: Option<PathBuf>,
}

/// Why the demo could not be run.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// No KVM.
    #[error(
        "the demo runs real machines and cannot use /dev/kvm: load kvm_intel or kvm_amd, or give this user access to it"
    )]
    Kvm(#[source] std::io::Error),
    /// The hosts could not be made, or Ctrl-C.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A daemon refused.
    #[error("{what} failed")]
    Daemon {
        /// What was asked.
        what: String,
        /// Its answer.
        #[source]
        source: ClientError,
    },
    /// No runtime for the client.
    #[error("cannot start the client's runtime")]
    Runtime(#[source] std::io::Error),
    /// The report could not be written.
    #[error("cannot write the report to {}", path.display())]
    Write {
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
}

/// Exit code after Ctrl-C, as shells expect it.
const INTERRUPTED: u8 = 130;

/// Runs the demo and shows it: 0 if every promise was kept, 1 if one was broken or the demo could not be run, 130 after
/// Ctrl-C. Blocks; must not be called from an asynchronous task.
pub fn main(options: &DemoOptions) -> ExitCode {
    let mut screen = Screen::new();
    let result = run::run(&mut screen).and_then(|report| {
        write_json(options.json.as_deref(), &report)?;
        Ok(report)
    });
    match result {
        Ok(report) => {
            screen.print(&report.lines());
            if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            let clean = sweep::leftovers(&sweep::process_prefix(std::process::id())).is_empty();
            screen.print(&explain(&error, clean));
            if interrupt::raised() { ExitCode::from(INTERRUPTED) } else { ExitCode::FAILURE }
        }
    }
}

fn explain(error: &DemoError, clean: bool) -> Vec<Line> {
    let after = if clean { "everything was removed" } else { "some objects could not be removed (ip netns list)" };
    if interrupt::raised() {
        return vec![Line::new().add(Style::Warn, format!(" interrupted: {after}"))];
    }
    let mut lines = vec![Line::new().add(Style::Bad, format!(" the demo ended early: {error}"))];
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        lines.push(Line::new().text(format!("   because {error}")));
        cause = error.source();
    }
    lines.push(Line::new().text(format!("   {after}")));
    lines
}

fn write_json(path: Option<&Path>, report: &DemoReport) -> Result<(), DemoError> {
    let Some(path) = path else { return Ok(()) };
    let failed = |source| DemoError::Write { path: path.to_owned(), source };
    let mut text = serde_json::to_vec_pretty(report).map_err(|error| failed(error.into()))?;
    text.push(b'\n');
    std::fs::write(path, text).map_err(failed)
}
