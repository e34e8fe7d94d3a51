//! One machine as hostd knows it: the part that is stored, and the part that is not.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::report::GuestRates;
use serde::{Deserialize, Serialize};
use vmm::api::client::Client;

use super::process::{Process, ProcessId};
use crate::api::types::{
    DirtyEstimate, Disk, KernelChoice, Machine, MachineStatus, MachineSummary, MigrationLimits, Network, ProbeSpec,
    Usage,
};
use crate::config::HostConfig;

/// What is stored of a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineRecord {
    /// Name.
    pub name: String,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Kernel that it was created with.
    pub kernel: KernelChoice,
    /// Initial RAM disk that it was created with.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Network cards.
    pub networks: Vec<Network>,
    /// Whether it has a balloon.
    #[serde(default)]
    pub balloon: bool,
    /// Declared probes.
    pub probes: Vec<ProbeSpec>,
    /// What its migrations may cost.
    pub limits: MigrationLimits,
    /// When it was first created.
    pub created_unix_ms: u64,
    /// What it was doing when this was stored.
    pub status: MachineStatus,
    /// Its process.
    pub process: Option<ProcessId>,
    /// Migration that moves it from or to here.
    pub migration: Option<String>,
    /// It came by migration: the paths of its kernel are those of the host where it was created.
    #[serde(default)]
    pub arrived: bool,
    /// Why it is stopped, if it is.
    #[serde(default)]
    pub why_stopped: Option<String>,
    /// Its disks lack blocks that never arrived: it must not be started from them.
    #[serde(default)]
    pub incomplete: bool,
}

impl MachineRecord {
    /// Total size of its disks that a migration copies.
    pub fn disk_bytes(&self) -> u64 {
        self.disks.iter().filter(|disk| !disk.shared).map(|disk| disk.bytes).sum()
    }
}

/// Everything that changes.
#[derive(Debug)]
pub struct State {
    /// What is stored.
    pub record: MachineRecord,
    /// Why it stopped.
    pub reason: Option<String>,
    /// Its process; shared with those who wait for its end.
    pub process: Option<Arc<Process>>,
    /// Last measurement.
    pub usage: Option<Usage>,
    /// What its guest did, as measured with `usage`.
    pub rates: Option<GuestRates>,
    /// It has arrived and its VMM still verifies: what that costs is no load of the machine.
    pub verifying: bool,
    /// It is being stopped, or a disk of it changed: it must stay where and what it is.
    pub changing: bool,
    /// What of its disks was allocated at the last measurement, in bytes.
    pub disk_allocated_bytes: Option<u64>,
    /// From the VMM.
    pub first_instruction_us: Option<u64>,
    /// How fast it dirties its memory, as sampled last.
    pub dirty: Option<DirtyEstimate>,
}

impl State {
    /// It has ended, and why.
    pub(super) fn stopped(&mut self, why: String) {
        self.record.status = MachineStatus::Stopped;
        self.record.why_stopped = Some(why.clone());
        self.reason = Some(why);
    }
}

/// One machine.
#[derive(Debug)]
pub struct Entry {
    state: Mutex<State>,
    /// Held by whoever has its dirty rate estimated: the VMM refuses a second one.
    pub(super) estimate: tokio::sync::Mutex<()>,
    api_socket: PathBuf,
}

impl Entry {
    /// A machine that has no process yet.
    pub fn new(config: &HostConfig, record: MachineRecord) -> Self {
        let api_socket = config.machine_run_dir(&record.name).join("api.sock");
        let state = State {
            reason: record.why_stopped.clone(),
            record,
            process: None,
            usage: None,
            rates: None,
            verifying: false,
            changing: false,
            disk_allocated_bytes: None,
            first_instruction_us: None,
            dirty: None,
        };
        Self { state: Mutex::new(state), estimate: tokio::sync::Mutex::default(), api_socket }
    }

    /// The state; held for moments only, never across an await.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of what is stored.
    pub fn record(&self) -> MachineRecord {
        self.state().record.clone()
    }

    /// What it is doing.
    pub fn status(&self) -> MachineStatus {
        self.state().record.status
    }

    /// Its VMM's API; calls block.
    pub fn client(&self) -> Client {
        Client::new(&self.api_socket)
    }

    /// Its process, if it has one that has not ended.
    pub fn process(&self) -> Option<Arc<Process>> {
        self.state().process.clone().filter(|process| process.ended().is_none())
    }

    /// As the API shows it.
    pub fn view(&self, config: &HostConfig) -> Machine {
        let state = self.state();
        let record = state.record.clone();
        Machine {
            api_socket: self.api_socket.clone(),
            console: config.machine_run_dir(&record.name).join("console.log"),
            name: record.name,
            status: record.status,
            reason: state.reason.clone(),
            host: config.host.clone(),
            pool: config.pool.clone(),
            vcpus: record.vcpus,
            memory_mib: record.memory_mib,
            kernel: record.kernel,
            cmdline: record.cmdline,
            disks: record.disks,
            networks: record.networks,
            balloon: record.balloon,
            probes: record.probes,
            limits: record.limits,
            pid: state.process.as_ref().filter(|process| process.ended().is_none()).map(|process| process.id().pid),
            first_instruction_us: state.first_instruction_us,
            created_unix_ms: record.created_unix_ms,
            migration: record.migration,
            usage: state.usage,
        }
    }

    /// As peers and pool views show it.
    pub fn summary(&self) -> MachineSummary {
        let state = self.state();
        MachineSummary {
            name: state.record.name.clone(),
            status: state.record.status,
            vcpus: state.record.vcpus,
            memory_mib: state.record.memory_mib,
            disk_bytes: state.record.disk_bytes(),
            disk_allocated_bytes: state.disk_allocated_bytes.unwrap_or_else(|| state.record.disk_bytes()),
            limits: state.record.limits.clone(),
            usage: state.usage,
            dirty: state.dirty,
        }
    }
}
