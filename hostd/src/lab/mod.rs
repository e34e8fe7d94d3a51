//! Real hosts on one machine: for the demo, the tests and the benchmarks.
//!
//! Each host is a network namespace with a bridge for its machines, a control group with a CPU quota, a directory, a
//! certificate and a `hostd` of its own; a fabric bridge joins them, and an observer sits on the same fabric (see
//! [`fabric`] for a picture). Addresses may repeat in other labs: they exist only inside the namespaces. Names begin with
//! `hr-<pid>-<number>-`, so labs do not meet, and what a crashed run left is found and removed by the next one
//! ([`sweep`]).
//!
//! | address | who |
//! | --- | --- |
//! | 10.77.0.1, .2, ... | hosts, in the order of the specification |
//! | 10.77.0.250 | observer |
//! | 10.77.1.1, .2, ... | free for machines ([`Lab::machine_address`]) |

pub mod cgroup;
pub mod error;
pub mod fabric;
pub mod host;
pub mod interrupt;
pub mod namespace;
pub mod sweep;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

pub use error::{LabError, LabResult};
pub use host::LabHost;

use crate::config::HostConfig;
use crate::security::pki;
use fabric::Fabric;
use namespace::Namespace;

/// Address of the observer.
pub const OBSERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 250);

/// Most hosts in a lab.
pub const HOSTS_MAX: usize = 64;

static NUMBER: AtomicU32 = AtomicU32::new(1);

/// One host to be made.
#[derive(Clone, Debug, PartialEq)]
pub struct HostSpec {
    /// Name: lower-case letters and digits, at most 12; also the name of its port on the fabric.
    pub name: String,
    /// Pool that it belongs to.
    pub pool: String,
    /// CPU quota in cores, enforced by a control group; `None` is no limit.
    pub cpu_cores: Option<f64>,
    /// Memory that its daemon may hand out, in MiB; `None` lets it measure.
    pub memory_mib: Option<f64>,
}

impl HostSpec {
    /// A host without limits.
    pub fn new(name: &str, pool: &str) -> Self {
        Self { name: name.to_owned(), pool: pool.to_owned(), cpu_cores: None, memory_mib: None }
    }

    /// The same with a CPU quota.
    #[must_use]
    pub fn with_cpu_cores(mut self, cores: f64) -> Self {
        self.cpu_cores = Some(cores);
        self
    }

    /// The same with so much memory to hand out, in MiB.
    #[must_use]
    pub fn with_memory_mib(mut self, mib: f64) -> Self {
        self.memory_mib = Some(mib);
        self
    }
}

/// Hosts, fabric and observer. Dropping it ends all processes and removes all objects.
pub struct Lab {
    prefix: String,
    directory: PathBuf,
    fabric: Fabric,
    observer: Namespace,
    hosts: Vec<LabHost>,
    unlimited: Option<String>,
    removed: bool,
}

/// Removes a half-built lab.
struct Remover<'a>(&'a str);

impl Drop for Remover<'_> {
    fn drop(&mut self) {
        // The error that ended the building is the one that is told.
        let _ = sweep::remove(self.0);
    }
}

impl Lab {
    /// Makes the namespaces, the network, the groups, the certificates and the directories. No daemon runs yet.
    ///
    /// # Errors
    /// When this is not root, a tool is missing, or the kernel refuses; nothing is left behind then.
    pub fn new(specs: &[HostSpec]) -> LabResult<Self> {
        if !nix::unistd::geteuid().is_root() {
            return Err(LabError::NotRoot);
        }
        sweep::remove_stale();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{}{number}-", sweep::process_prefix(std::process::id()));
        let guard = Remover(&prefix);
        let lab = Self::build(specs, prefix.clone())?;
        std::mem::forget(guard);
        Ok(lab)
    }

    fn build(specs: &[HostSpec], prefix: String) -> LabResult<Self> {
        let directory = std::env::temp_dir().join(format!("{prefix}files"));
        make_private_directory(&directory)?;
        interrupt::check()?;
        let fabric = Fabric::create(&format!("{prefix}fabric"))?;
        let observer = Namespace::create(&format!("{prefix}observer"))?;
        fabric.attach_plain(&observer, "observer", OBSERVER)?;
        let authority = directory.join("authority");
        pki::create_authority(&authority, "headroom lab")?;
        let controller = cgroup::Controller::find();
        let mut hosts = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().take(HOSTS_MAX).enumerate() {
            interrupt::check()?;
            let address = Ipv4Addr::new(10, 77, 0, u8::try_from(index + 1).unwrap_or(u8::MAX));
            let full = format!("{prefix}{}", spec.name);
            let namespace = Namespace::create(&full)?;
            fabric.attach_host(&namespace, &spec.name, address)?;
            // Also without a quota: the group tells which processes are this host's.
            let group =
                controller.as_ref().ok().map(|controller| controller.create(&full, spec.cpu_cores)).transpose()?;
            let tls = pki::issue(&authority, &spec.name)?;
            let path = directory.join(&spec.name);
            hosts.push(LabHost::create(spec.clone(), address, path, namespace, group, tls)?);
        }
        let unlimited = controller.err().filter(|_| specs.iter().any(|spec| spec.cpu_cores.is_some()));
        Ok(Self { prefix, directory, fabric, observer, hosts, unlimited, removed: false })
    }

    /// Writes every host's configuration, after `adjust` has changed it, starts all daemons and waits until they answer.
    ///
    /// # Errors
    /// When a program is missing or a daemon does not become ready.
    pub fn start_daemons(&self, adjust: impl Fn(&mut HostConfig)) -> LabResult<()> {
        let (hostd, vmm) = (binary("hostd")?, binary("headroom-vmm")?);
        for host in &self.hosts {
            host.write_config(&self.config(host, &vmm, &adjust))?;
            host.spawn_daemon(&hostd)?;
        }
        self.hosts.iter().try_for_each(LabHost::wait_ready)
    }

    fn config(&self, host: &LabHost, vmm: &Path, adjust: &impl Fn(&mut HostConfig)) -> HostConfig {
        let peers = self.hosts.iter().filter(|peer| peer.name() != host.name()).map(LabHost::as_peer).collect();
        let mut config = host.default_config(peers, vmm.to_owned());
        adjust(&mut config);
        config
    }

    /// All hosts.
    pub fn hosts(&self) -> &[LabHost] {
        &self.hosts
    }

    /// One host.
    ///
    /// # Errors
    /// [`LabError::UnknownHost`].
    pub fn host(&self, name: &str) -> LabResult<&LabHost> {
        self.hosts.iter().find(|host| host.name() == name).ok_or_else(|| LabError::UnknownHost(name.to_owned()))
    }

    /// Address for the machine with this number (0, 1, ...).
    pub fn machine_address(number: u16) -> Ipv4Addr {
        let [high, low] = (256 + 1 + number).to_be_bytes();
        Ipv4Addr::new(10, 77, high, low)
    }

    /// The observer's namespace.
    pub fn observer(&self) -> &Namespace {
        &self.observer
    }

    /// The network between the hosts.
    pub fn fabric(&self) -> &Fabric {
        &self.fabric
    }

    /// Folder of the authority that signed the certificates of this lab's hosts and of no other's.
    pub fn authority(&self) -> PathBuf {
        self.directory.join("authority")
    }

    /// Files of this lab.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What all names of this lab begin with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Why CPU quotas that were asked for are not enforced; `None` if they are.
    pub fn unlimited(&self) -> Option<&str> {
        self.unlimited.as_deref()
    }

    /// Removes everything now and tells what would not go; dropping does the same silently.
    ///
    /// # Errors
    /// [`LabError::Leftovers`].
    pub fn remove(mut self) -> LabResult<()> {
        self.tear_down()
    }

    fn tear_down(&mut self) -> LabResult<()> {
        self.removed = true;
        for host in &self.hosts {
            host.kill_daemon();
        }
        sweep::remove(&self.prefix)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.removed {
            return;
        }
        if let Err(error) = self.tear_down() {
            tracing::warn!("{error}");
        }
    }
}

fn make_private_directory(path: &Path) -> LabResult<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().mode(0o700).create(path).map_err(LabError::io("create", path))
}

/// A program of this project, beside the running one (or one above, for a test in `target/*/deps`).
///
/// # Errors
/// [`LabError::Binary`] says where it should have been.
pub fn binary(name: &str) -> LabResult<PathBuf> {
    let own = std::env::current_exe().map_err(LabError::io("find", "/proc/self/exe"))?;
    let mut directory = own.parent().unwrap_or(Path::new("/")).to_owned();
    if directory.ends_with("deps") || directory.ends_with("examples") {
        directory.pop();
    }
    let path = directory.join(name);
    if path.is_file() { Ok(path) } else { Err(LabError::Binary { path }) }
}
