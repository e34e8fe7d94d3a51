//! Machines: what an operator asks for and what there is.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmm::config::MigrationLimits;

/// Which kernel a new machine boots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum KernelChoice {
    /// The bundled guest.
    #[default]
    Bundled,
    /// A file on the host: ELF with a PVH note, `vmlinux` or bzImage.
    Path(PathBuf),
}

impl KernelChoice {
    /// Whether it is the bundled guest.
    pub fn is_bundled(&self) -> bool {
        *self == Self::Bundled
    }
}

impl From<String> for KernelChoice {
    fn from(text: String) -> Self {
        if text == "bundled" { Self::Bundled } else { Self::Path(PathBuf::from(text)) }
    }
}

impl From<KernelChoice> for String {
    fn from(kernel: KernelChoice) -> Self {
        match kernel {
            KernelChoice::Bundled => "bundled".to_owned(),
            KernelChoice::Path(path) => path.display().to_string(),
        }
    }
}

/// A question put to the guest from the destination after a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ProbeSpec {
    /// One ICMP echo request must be answered.
    Ping(IpAddr),
    /// A TCP connection must be accepted.
    Tcp(SocketAddr),
    /// A TCP connection must be accepted and must send back what it is sent.
    TcpEcho(SocketAddr),
}

/// `POST /v1/machines`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateMachine {
    /// Name: letters, digits, `-` and `_`, 1 to 64, first a letter or digit; unique in all pools that this host knows.
    pub name: String,
    /// Number of vCPUs, 1 to 64.
    #[serde(default = "one")]
    pub vcpus: u16,
    /// RAM in MiB, 16 to 1,048,576.
    pub memory_mib: u64,
    /// `"bundled"` or the path of a kernel.
    #[serde(default)]
    pub kernel: KernelChoice,
    /// Initial RAM disk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Disks in the order in which the guest sees them, at most 8.
    #[serde(default)]
    pub disks: Vec<NewDisk>,
    /// Network cards in the order in which the guest sees them, at most 8.
    #[serde(default)]
    pub networks: Vec<NewNetwork>,
    /// A balloon, through which the guest's driver gives free memory back to the host, and tells a migration what it need not
    /// send. Hosts of a release without it do not take the machine.
    #[serde(default)]
    pub balloon: bool,
    /// Asked after each migration from the destination.
    #[serde(default)]
    pub probes: Vec<ProbeSpec>,
    /// What its migrations may cost, unless the request says otherwise.
    #[serde(default)]
    pub limits: MigrationLimits,
}

impl CreateMachine {
    /// All files of the host that it names.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let kernel = match &self.kernel {
            KernelChoice::Path(path) => Some(path.as_path()),
            KernelChoice::Bundled => None,
        };
        let disks = self.disks.iter().filter_map(|disk| disk.path.as_deref());
        kernel.into_iter().chain(self.initrd.as_deref()).chain(disks)
    }
}

fn one() -> u16 {
    1
}

/// One disk of a new machine: exactly one of `size_mib` and `path`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewDisk {
    /// Name, unique in the machine.
    pub id: String,
    /// Make an empty sparse image of so many MiB; deleted with the machine.
    #[serde(default)]
    pub size_mib: Option<u64>,
    /// Use this raw image or block device; left alone when the machine is deleted.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// Refuse writes of the guest.
    #[serde(default)]
    pub read_only: bool,
    /// `path` is a file on storage that the other hosts have under the same path, below one of `shared_dirs` of each host's
    /// configuration: a migration hands it over instead of copying it.
    #[serde(default)]
    pub shared: bool,
}

/// One network card of a new machine; hostd makes its tap and attaches it to the bridge of its configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewNetwork {
    /// Name, unique in the machine.
    pub id: String,
    /// MAC address; without one hostd derives a locally administered one from the machine's name and the card's id.
    #[serde(default)]
    pub mac: Option<String>,
}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineStatus {
    /// Disks, taps and process are being made.
    Creating,
    /// Arriving by migration; nothing of it runs here yet.
    Incoming,
    /// Running here.
    Running,
    /// Its vCPUs were stopped by an operator.
    Paused,
    /// Running here while it is being moved away.
    Migrating,
    /// Commit was sent and not answered: it runs nowhere until both daemons have settled where.
    InDoubt,
    /// The guest ended or failed; `reason` says which.
    Stopped,
    /// Being deleted, or what is left here of a machine that has moved away.
    Deleting,
}

/// Measured over the last sampling interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Usage {
    /// Processor time in cores (1.5 = one and a half cores busy).
    pub cpu_cores: f64,
    /// Processor time wanted: `cpu_cores` and the time spent waiting for a core. Load can exceed a capacity only in this
    /// measure. 0 where the kernel does not tell.
    pub cpu_demand_cores: f64,
    /// Resident memory in MiB.
    pub memory_mib: f64,
    /// Read and written.
    pub disk_bytes_per_second: f64,
    /// Received and sent.
    pub network_bytes_per_second: f64,
}

/// One disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Name.
    pub id: String,
    /// Image on this host.
    pub path: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// Made by hostd, and deleted with the machine.
    pub owned: bool,
    /// Refuses writes of the guest.
    pub read_only: bool,
    /// On storage that other hosts have as well.
    #[serde(default)]
    pub shared: bool,
}

/// `POST /v1/machines/{name}/stop`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopMachine {
    /// How long its guest may take to shut down, in seconds, 1 to 3600; it goes on running after that.
    #[serde(default = "one_minute")]
    pub timeout_s: u64,
    /// Do not ask the guest: what it has not written is lost.
    #[serde(default)]
    pub force: bool,
}

fn one_minute() -> u64 {
    60
}

impl Default for StopMachine {
    fn default() -> Self {
        Self { timeout_s: one_minute(), force: false }
    }
}

/// `POST /v1/machines/{name}/detach`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetachDisk {
    /// Which disk.
    pub id: String,
}

/// One network card of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Name.
    pub id: String,
    /// Tap device on this host.
    pub tap: String,
    /// MAC address.
    pub mac: String,
}

/// `GET /v1/machines/{name}`, and the elements of `GET /v1/machines`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Name.
    pub name: String,
    /// What it is doing.
    pub status: MachineStatus,
    /// Why it stopped, or what is wrong with it.
    pub reason: Option<String>,
    /// Host that runs it.
    pub host: String,
    /// Pool of that host.
    pub pool: String,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Kernel that it was created with.
    pub kernel: KernelChoice,
    /// Its command line.
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
    /// Process id of its VMM; `null` while there is none.
    pub pid: Option<u32>,
    /// The VMM's API socket.
    pub api_socket: PathBuf,
    /// Where its serial console goes.
    pub console: PathBuf,
    /// From the start of the VMM to the guest's first instruction, where it was started here.
    pub first_instruction_us: Option<u64>,
    /// When it was first created, on whichever host that was.
    pub created_unix_ms: u64,
    /// Migration that is moving it now.
    pub migration: Option<String>,
    /// Measured over the last sampling interval; `null` before the first two samples.
    pub usage: Option<Usage>,
}
