//! The configuration of one host: one JSON file, read once at start.
//!
//! ```json
//! {
//!   "host": "a1", "pool": "a",
//!   "run_dir": "/run/headroom", "state_dir": "/var/lib/headroom",
//!   "socket": "/run/headroom/hostd.sock",
//!   "listen": "10.1.0.1:7420", "migration_address": "10.1.0.1",
//!   "tls": {"ca": "/etc/headroom/ca.pem", "certificate": "/etc/headroom/a1.pem", "key": "/etc/headroom/a1.key"},
//!   "bridge": "br0",
//!   "peers": [{"host": "b1", "pool": "b", "address": "10.1.0.2:7420"}]
//! }
//! ```
//!
//! Everything else has a default. Unknown fields are errors.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmm::config::{DirtyTracking, MigrationLimits};

use crate::api::types::OnFailedProbe;
use crate::security::access::AccessRule;

mod validate;

pub(crate) use validate::host_name_ok;
pub use validate::{ConfigError, Mistake};

/// Most attempts after the first one that may be asked for.
pub const RETRIES_MAX: u32 = 100;

/// One host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Name of this host; its certificate carries it. Letters, digits, `-` and `.`, at most 64.
    pub host: String,
    /// Pool that it belongs to.
    pub pool: String,
    /// Sockets and files that need not survive a reboot: made if missing, mode 0700.
    pub run_dir: PathBuf,
    /// Disks and the store: made if missing, mode 0700.
    pub state_dir: PathBuf,
    /// Folders on storage that other hosts have under the same paths: images below them can be shared, and machines that arrive may
    /// use them.
    #[serde(default)]
    pub shared_dirs: Vec<PathBuf>,
    /// Folders with kernels, images and devices that users of the control socket who are not root may give to machines; see
    /// [`crate::security::images`].
    #[serde(default)]
    pub image_dirs: Vec<PathBuf>,
    /// Control socket.
    pub socket: PathBuf,
    /// Unix group whose members may use the control socket besides root.
    #[serde(default)]
    pub socket_group: Option<String>,
    /// Where peers reach this daemon by mutual TLS.
    pub listen: SocketAddr,
    /// Address on which incoming migrations listen (the kernel chooses the port).
    pub migration_address: IpAddr,
    /// Identity of this host.
    pub tls: TlsPaths,
    /// `headroom-vmm`; without it the one beside the running binary, then the one in `PATH`.
    #[serde(default)]
    pub vmm: Option<PathBuf>,
    /// What this host may hand out; what is left out is measured.
    #[serde(default)]
    pub capacity: CapacityConfig,
    /// All other hosts that this one deals with, of its own pool and of others.
    #[serde(default)]
    pub peers: Vec<PeerConfig>,
    /// Bridge that taps are attached to; without it they are attached to nothing.
    #[serde(default)]
    pub bridge: Option<String>,
    /// How often machines and host are measured, 50 to 60,000.
    #[serde(default = "default_interval")]
    pub sample_interval_ms: u64,
    /// Planner.
    #[serde(default)]
    pub planner: PlannerConfig,
    /// What migrations may cost this host, and what becomes of those that fail.
    #[serde(default)]
    pub migration: MigrationConfig,
    /// Migrations from and to this host at the same time; more wait.
    #[serde(default = "default_concurrency")]
    pub concurrent_migrations: usize,
    /// Who may do what; see [`crate::security::access`].
    #[serde(default)]
    pub access: Vec<AccessRule>,
}

fn default_interval() -> u64 {
    1000
}

fn default_concurrency() -> usize {
    2
}

/// Migrations: their budget, and what becomes of those that fail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MigrationConfig {
    /// Bytes per second over all migrations that leave this host, shared among them; without it there is no limit.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// If the link is lost in post-copy to this host: how long the machine waits for its source before it is given up, 1 to
    /// 604,800.
    pub recover_s: u64,
    /// What has arrived of the disks of a machine that did not come is kept so long in seconds, so that another attempt sends only the
    /// rest; 0 to 604,800.
    pub keep_disks_s: u64,
    /// How the pages are recorded that machines started on this host write while they migrate from it.
    pub dirty_tracking: DirtyTracking,
    /// How often a migration that failed for a reason that may be gone soon is tried again, unless its request says so.
    pub retries: u32,
    /// What a failed probe means, unless the request says so.
    pub on_failed_probe: OnFailedProbe,
}

impl Default for MigrationConfig {
    fn default() -> Self {
        Self {
            bandwidth_bytes_per_second: None,
            recover_s: vmm::config::ReceiveConfig::RECOVER_S,
            keep_disks_s: 3600,
            dirty_tracking: DirtyTracking::default(),
            retries: 0,
            on_failed_probe: OnFailedProbe::default(),
        }
    }
}

/// Files with this host's identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsPaths {
    /// Certificates of the authority that signed all hosts.
    pub ca: PathBuf,
    /// This host's certificate chain.
    pub certificate: PathBuf,
    /// Its private key; readable by its owner only.
    pub key: PathBuf,
}

/// What a host may hand out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CapacityConfig {
    /// Processor cores; measured: the cgroup's quota or else the processors that are online.
    pub cpu_cores: Option<f64>,
    /// Memory in MiB; measured: the cgroup's limit or else the memory of the computer, less 5 % for the host itself.
    pub memory_mib: Option<f64>,
    /// Disk throughput; 500 MB/s if not given, since it cannot be known without disturbing the host.
    pub disk_bytes_per_second: Option<f64>,
    /// Network throughput; 1.25 GB/s (10 Gbit/s) if not given.
    pub network_bytes_per_second: Option<f64>,
    /// Room for disk images in MiB; measured: what the file system of `state_dir` has free.
    pub disk_space_mib: Option<f64>,
}

/// Another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Its name, which its certificate must carry.
    pub host: String,
    /// Its pool.
    pub pool: String,
    /// Its `listen` address.
    pub address: SocketAddr,
}

/// Planner: when to act, and how much.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PlannerConfig {
    /// Whether this host plans for its pool (if it is the pool's leader); forecasts are made in any case.
    pub enabled: bool,
    /// How far to look ahead, in seconds; at most 2,016 sampling intervals.
    pub horizon_s: f64,
    /// Score (probability of contention within the horizon, weighted) at which it starts to act, 0 to 1.
    pub start_score: f64,
    /// Score below which it is quiet again (hysteresis), 0 to `start_score`.
    pub stop_score: f64,
    /// The score must have been high in so many successive samples.
    pub confirmations: u32,
    /// After a migration of a pool wait so long before the next one of that pool.
    pub cooldown_s: f64,
    /// The cooldown grows by this factor with each further migration in the same rise of the score, 1 to 10.
    pub backoff: f64,
    /// After a move a machine rests for so long, doubled with every further move.
    pub machine_cooldown_s: f64,
    /// Share of the capacity above which a pool counts as contended.
    pub thresholds: Thresholds,
    /// How much each resource counts in the score, 0 to 1.
    pub weights: ResourceWeights,
    /// Share of a destination's capacity that may be used after the move, at the upper forecast quantile.
    pub target_use: f64,
    /// A destination's pool must stay below this score.
    pub target_score: f64,
    /// A planned migration is to be over so many seconds before contention is expected; until its latest safe start it waits,
    /// since a forecast that does not come true needs no move.
    pub lead_s: f64,
    /// Contention is expected as soon as it is so probable: the chance that is taken by waiting, 0 to 1.
    pub early_risk: f64,
    /// Violation minutes (time above the limit, weighted by probability) that a move must avoid to be worth it.
    pub minimum_benefit_minutes: f64,
    /// Outcomes that are kept of each horizon and resource, of all pools together, to fit trees to; each takes 160 bytes. 0 = no trees.
    pub lessons: usize,
    /// How pools are sized; see `headroom capacity`.
    pub capacity: SizingConfig,
    /// What planned migrations may cost; without it each machine's own limits.
    pub limits: Option<MigrationLimits>,
}

/// How many hosts a pool should have.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SizingConfig {
    /// Accepted probability that a pool runs out of hosts, 0.0001 to 0.5.
    pub risk: f64,
    /// From the order of a host until it takes machines, in seconds.
    pub lead_s: f64,
    /// A host is released when it has been superfluous for so long, in seconds.
    pub hold_s: f64,
    /// Hosts that a pool keeps at least.
    pub least_hosts: usize,
    /// Hosts that a pool may have at most.
    pub most_hosts: usize,
}

impl Default for SizingConfig {
    fn default() -> Self {
        Self { risk: 0.05, lead_s: 600.0, hold_s: 3_600.0, least_hosts: 1, most_hosts: 1_000 }
    }
}

impl Default for PlannerConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            horizon_s: 600.0,
            start_score: 0.5,
            stop_score: 0.25,
            confirmations: 2,
            cooldown_s: 120.0,
            backoff: 2.0,
            machine_cooldown_s: 900.0,
            thresholds: Thresholds::default(),
            weights: ResourceWeights::default(),
            target_use: 0.9,
            target_score: 0.2,
            lead_s: 60.0,
            early_risk: 0.1,
            minimum_benefit_minutes: 0.05,
            lessons: predictor::experience::LESSONS,
            capacity: SizingConfig::default(),
            limits: None,
        }
    }
}

/// Share of the capacity above which a pool counts as contended.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Thresholds {
    /// Processor.
    pub cpu: f64,
    /// Memory.
    pub memory: f64,
    /// Disk.
    pub io: f64,
    /// Network.
    pub network: f64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self { cpu: 0.95, memory: 0.9, io: 0.9, network: 0.9 }
    }
}

/// Weights of the resources in the contention score.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResourceWeights {
    /// Processor.
    pub cpu: f64,
    /// Memory.
    pub memory: f64,
    /// Disk.
    pub io: f64,
    /// Network.
    pub network: f64,
}

impl Default for ResourceWeights {
    fn default() -> Self {
        Self { cpu: 1.0, memory: 1.0, io: 0.7, network: 0.7 }
    }
}

impl HostConfig {
    /// Reads and validates the file at `path`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] names the file, every mistake in it and what to do.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let config: Self =
            serde_json::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source })?;
        let mistakes = config.mistakes();
        if mistakes.is_empty() { Ok(config) } else { Err(ConfigError::Invalid { path: path.to_owned(), mistakes }) }
    }

    /// Every mistake that can be seen without touching the system.
    pub fn mistakes(&self) -> Vec<Mistake> {
        validate::mistakes(self)
    }

    /// The peer of that name.
    pub fn peer(&self, host: &str) -> Option<&PeerConfig> {
        self.peers.iter().find(|peer| peer.host == host)
    }

    /// Folder of one machine's sockets and logs.
    pub fn machine_run_dir(&self, machine: &str) -> PathBuf {
        self.run_dir.join("machines").join(machine)
    }

    /// Folder of one machine's disks.
    pub fn machine_state_dir(&self, machine: &str) -> PathBuf {
        self.images_dir().join(machine)
    }

    /// Below it every machine has a folder for its disks.
    pub fn images_dir(&self) -> PathBuf {
        self.state_dir.join("machines")
    }

    /// Below it are images of machines that did not come.
    pub fn partial_dir(&self) -> PathBuf {
        self.state_dir.join("partial")
    }

    /// The embedded store.
    pub fn store_path(&self) -> PathBuf {
        self.state_dir.join("hostd.redb")
    }
}
