//! The configuration of one machine, as `headroom-vmm --config FILE` reads it.

use std::net::SocketAddr;
use std::path::PathBuf;

use migration::policy::MigrationMode;
use serde::{Deserialize, Serialize};

/// One machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Name, unique on its host: letters, digits, `-` and `_`, at most 64.
    pub name: String,
    /// Number of vCPUs, 1 to 64.
    #[serde(default = "one")]
    pub vcpus: u16,
    /// RAM in MiB, 16 to 1,048,576.
    pub memory_mib: u64,
    /// Kernel: an ELF with a PVH note, an ELF `vmlinux`, or a bzImage. Not needed by a machine that arrives by migration.
    #[serde(default)]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line; the VMM appends its virtio-mmio devices.
    #[serde(default)]
    pub cmdline: String,
    /// Disks.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Network cards.
    #[serde(default)]
    pub networks: Vec<NetworkConfig>,
    /// The memory balloon; `null`: none.
    #[serde(default)]
    pub balloon: Option<BalloonConfig>,
    /// Where the serial console goes.
    #[serde(default)]
    pub serial: SerialConfig,
    /// How written pages are recorded while it migrates.
    #[serde(default)]
    pub dirty_tracking: DirtyTracking,
}

/// How KVM records the pages that vCPUs write. Chosen when the machine is made; both ends of a migration need not agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirtyTracking {
    /// By rings if the machine has more than one vCPU and they can be used on this host, else by the log.
    Auto,
    /// One bitmap for all vCPUs.
    #[default]
    Log,
    /// A ring for each vCPU: it is known what each one dirties, and only those that dirty are throttled. Refused where this
    /// host's KVM would lose entries.
    Ring,
}

fn one() -> u16 {
    1
}

/// A configuration that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The machine's name, or that of a disk or network.
    #[error("{what} name {name:?} must have 1 to 64 letters, digits, '-' or '_'")]
    Name {
        /// Whose name.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Two devices of one name.
    #[error("the name {0:?} is given to two devices: each disk and network needs its own")]
    Twice(String),
    /// Number of vCPUs.
    #[error("vcpus is {0}: 1 to 64 are possible")]
    Vcpus(u16),
    /// More vCPUs than this host's KVM has.
    #[error("{wanted} vCPUs were asked for, this host's KVM takes at most {most}: lower vcpus")]
    TooManyVcpus {
        /// Configured.
        wanted: u16,
        /// What KVM says.
        most: usize,
    },
    /// A ring was asked for.
    #[error(
        "dirty_tracking is \"ring\", and this host's KVM has no dirty rings (Linux 5.11 or newer): use \"auto\" or \"log\""
    )]
    NoDirtyRing,
    /// A ring was asked for and cannot be trusted.
    #[error("dirty_tracking is \"ring\", and {0}: use \"auto\" or \"log\"")]
    UnfitDirtyRing(String),
    /// Size of memory.
    #[error("memory_mib is {0}: 16 to 1048576 MiB are possible")]
    Memory(u64),
    /// Size of the balloon.
    #[error("the balloon's target of {target} MiB is not less than memory_mib, {memory}: lower it")]
    Balloon {
        /// MiB that the guest would be asked to give back.
        target: u64,
        /// MiB that it has.
        memory: u64,
    },
    /// Number of devices.
    #[error("{wanted} disks, networks and balloons were asked for, a machine has room for {most}: remove some")]
    TooManyDevices {
        /// Configured.
        wanted: usize,
        /// Interrupt lines for them.
        most: usize,
    },
}

impl MachineConfig {
    /// Checks what the types cannot say. Files and taps are looked at when they are opened.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] that names the field, its value and what is possible.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_name("machine", &self.name)?;
        if !(1..=64).contains(&self.vcpus) {
            return Err(ConfigError::Vcpus(self.vcpus));
        }
        if !(16..=1 << 20).contains(&self.memory_mib) {
            return Err(ConfigError::Memory(self.memory_mib));
        }
        if let Some(balloon) = &self.balloon {
            balloon.check(self.memory_mib)?;
        }
        let (wanted, most) = (self.virtio_devices(), crate::kvm::irq::MAX_VIRTIO_DEVICES);
        if wanted > most {
            return Err(ConfigError::TooManyDevices { wanted, most });
        }
        let disks = self.disks.iter().map(|disk| ("disk", &disk.id));
        let mut seen = Vec::with_capacity(wanted);
        for (what, id) in disks.chain(self.networks.iter().map(|network| ("network", &network.id))) {
            check_name(what, id)?;
            if seen.contains(&id) {
                return Err(ConfigError::Twice(id.clone()));
            }
            seen.push(id);
        }
        Ok(())
    }
}

impl MachineConfig {
    /// How many virtio devices it has.
    pub fn virtio_devices(&self) -> usize {
        self.disks.len() + self.networks.len() + usize::from(self.balloon.is_some())
    }
}

fn check_name(what: &'static str, name: &str) -> Result<(), ConfigError> {
    let fits = (1..=64).contains(&name.len());
    if fits && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_') {
        Ok(())
    } else {
        Err(ConfigError::Name { what, name: name.chars().take(100).collect() })
    }
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name, unique in the machine; travels with a migration.
    pub id: String,
    /// The raw image: a path, or an open file descriptor inherited from the parent.
    #[serde(flatten)]
    pub source: DiskSource,
    /// Refuse writes of the guest.
    #[serde(default)]
    pub read_only: bool,
    /// The image is on storage that both hosts of a migration have: it is not copied but handed over.
    #[serde(default)]
    pub shared: bool,
}

/// Where a disk's bytes are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskSource {
    /// A raw image file or a block device.
    Path(PathBuf),
    /// A file descriptor that the parent left open.
    Fd(i32),
}

/// One network card.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// Name, unique in the machine; travels with a migration.
    pub id: String,
    /// The tap device.
    #[serde(flatten)]
    pub source: TapSource,
    /// MAC address, for example `02:00:00:00:00:05`: unicast and locally administered.
    pub mac: String,
}

/// Where a network card's frames go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TapSource {
    /// Name of an existing tap device (created with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`).
    Tap(String),
    /// An open tap file descriptor that the parent left open.
    Fd(i32),
}

/// The memory balloon, through which the guest gives memory back to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// MiB that the guest is asked to give back from the beginning; less than it has.
    pub target_mib: u64,
    /// The guest may take pages back by itself before it would run out of memory.
    pub deflate_on_oom: bool,
    /// The guest gives pages back whenever they become free, without being asked.
    pub free_page_reporting: bool,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self { target_mib: 0, deflate_on_oom: true, free_page_reporting: true }
    }
}

impl BalloonConfig {
    /// Checks the target against the machine's memory.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Balloon`].
    pub fn check(&self, memory_mib: u64) -> Result<(), ConfigError> {
        if self.target_mib < memory_mib {
            Ok(())
        } else {
            Err(ConfigError::Balloon { target: self.target_mib, memory: memory_mib })
        }
    }
}

/// Where the serial console goes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SerialConfig {
    /// Nowhere.
    #[default]
    Off,
    /// Standard output (and input, if it is a terminal).
    Stdio,
    /// Appended to a file. At 1 MiB it gets the ending `.old`, in place of the one before it, and a new one begins.
    File(PathBuf),
}

/// Keys and certificates of this host, as PEM.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsIdentity {
    /// Certificates of the authority that signed both hosts.
    pub ca_pem: String,
    /// This host's certificate chain.
    pub certificate_pem: String,
    /// Its private key.
    pub key_pem: String,
}

impl std::fmt::Debug for TlsIdentity {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("TlsIdentity(..)")
    }
}

/// A migration to be received (`PUT /v1/migration/receive`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiveConfig {
    /// Migration id, agreed by both daemons.
    pub id: String,
    /// Where to listen; port 0 lets the kernel choose, and the answer tells which.
    pub listen: SocketAddr,
    /// One-time secret that the source must present, hexadecimal, 32 bytes.
    pub token: String,
    /// Host name that the source's certificate must carry.
    pub source_host: String,
    /// This host's name.
    pub destination_host: String,
    /// Identity of this host.
    pub tls: TlsIdentity,
    /// Give up if nothing has been committed by then.
    pub deadline_s: u64,
    /// If the link is lost in post-copy: how long to wait for the source to reconnect before the machine, which lacks a part of
    /// itself, is stopped for good.
    #[serde(default = "default_recover_s")]
    pub recover_s: u64,
    /// A file that is made empty now, and written to right before the machine runs for the first time: if this process dies, its
    /// length tells whether the machine had run in it. `null`: none.
    #[serde(default)]
    pub mark: Option<PathBuf>,
    /// The images of the disks hold what an earlier attempt has left: blocks that are still right are not sent again.
    #[serde(default)]
    pub reuse_disks: bool,
}

impl ReceiveConfig {
    /// [`ReceiveConfig::recover_s`] if nothing is given: ten minutes.
    pub const RECOVER_S: u64 = 600;

    /// What [`ReceiveConfig::mark`] holds once the machine has run here.
    pub const RAN: &str = "ran\n";

    /// The same while it lacks a part of itself (post-copy).
    pub const RAN_INCOMPLETE: &str = "ran, and lacks a part of itself\n";
}

fn default_recover_s() -> u64 {
    ReceiveConfig::RECOVER_S
}

/// A migration to be sent (`PUT /v1/migration/send`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SendConfig {
    /// Migration id, agreed by both daemons.
    pub id: String,
    /// The destination's listener.
    pub address: SocketAddr,
    /// The one-time secret, hexadecimal, 32 bytes.
    pub token: String,
    /// This host's name, for the report.
    pub source_host: String,
    /// Host name that the destination's certificate must carry.
    pub destination_host: String,
    /// Identity of this host.
    pub tls: TlsIdentity,
    /// What the operator allows.
    #[serde(default)]
    pub limits: MigrationLimits,
    /// When it is ready, wait for `PUT /v1/migration/continue` before the guest is stopped.
    #[serde(default)]
    pub pause_before_switchover: bool,
    /// Why it was started; copied into the report.
    #[serde(default)]
    pub trigger: migration::report::Trigger,
}

/// What the operator allows a migration to cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MigrationLimits {
    /// Longest downtime, in milliseconds, that the switchover may be expected to take.
    pub downtime_ms: u64,
    /// Bytes per second over all channels; `null` is no limit.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// Memory channels, each its own TLS session and thread at both hosts, 1 to 16; 2 by default.
    pub streams: u16,
    /// Give up after so many memory rounds without convergence.
    pub max_rounds: u32,
    /// Give up after so many seconds.
    pub timeout_s: u64,
    /// When it does not converge: give up, or accept a longer downtime.
    pub force_switchover: bool,
    /// Test mode: compare full images of both stopped machines before Commit.
    pub compare_full: bool,
    /// `precopy`, `postcopy` (after one round), or `hybrid`: post-copy when pre-copy does not converge, if the destination can.
    pub mode: MigrationMode,
    /// Where pre-copy does not converge: most of its time, in per cent from 0 to 99, for which a vCPU that dirties may be held;
    /// 0, the default, holds none. Left out then: a host of an earlier release does not know it.
    #[serde(skip_serializing_if = "nobody_held")]
    pub throttle_max_percent: u8,
}

fn nobody_held(percent: &u8) -> bool {
    *percent == 0
}

impl Default for MigrationLimits {
    fn default() -> Self {
        Self {
            downtime_ms: 50,
            bandwidth_bytes_per_second: None,
            streams: 2,
            max_rounds: 30,
            timeout_s: 600,
            force_switchover: false,
            compare_full: false,
            mode: MigrationMode::default(),
            throttle_max_percent: 0,
        }
    }
}
