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
use vmm::config::MigrationLimits;

use crate::security::access::AccessRule;

mod validate;

pub(crate) use validate::host_name_ok;
pub use validate::{ConfigError, Mistake};

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
    /// How far to look ahead, in seconds.
    pub horizon_s: f64,
    /// Score (probability of contention within the horizon) at which it starts to act, 0 to 1.
    pub start_score: f64,
    /// Score below which it is quiet again (hysteresis), 0 to `start_score`.
    pub stop_score: f64,
    /// The score must have been high in so many successive samples.
    pub confirmations: u32,
    /// After a migration of a pool wait so long before the next one of that pool.
    pub cooldown_s: f64,
    /// Share of the capacity that counts as full, 0 to 1: contention is load above this share.
    pub full_share: f64,
    /// A destination must keep this share of its capacity free after the move, at the upper forecast quantile.
    pub reserve_share: f64,
    /// Weights of the resources in the score.
    pub weights: ResourceWeights,
    /// What planned migrations may cost; without it each machine's own limits.
    pub limits: Option<MigrationLimits>,
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
            full_share: 1.0,
            reserve_share: 0.1,
            weights: ResourceWeights::default(),
            limits: None,
        }
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
    /// Disk and network.
    pub io: f64,
}

impl Default for ResourceWeights {
    fn default() -> Self {
        Self { cpu: 1.0, memory: 1.0, io: 0.5 }
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
        self.state_dir.join("machines").join(machine)
    }

    /// The embedded store.
    pub fn store_path(&self) -> PathBuf {
        self.state_dir.join("hostd.redb")
    }
}
