//! One host of a lab: its namespace, its control group, its files and its daemon.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::cgroup::Cgroup;
use super::error::{LabError, LabResult};
use super::namespace::Namespace;
use super::{HostSpec, interrupt};
use crate::client::Client;
use crate::config::{CapacityConfig, HostConfig, PeerConfig, TlsPaths};

/// Port on which the daemons listen for each other.
pub const PEER_PORT: u16 = 7420;

/// How long a daemon may take until it answers.
const READY_DEADLINE: Duration = Duration::from_secs(20);

/// One host.
#[derive(Debug)]
pub struct LabHost {
    spec: HostSpec,
    address: Ipv4Addr,
    directory: PathBuf,
    tls: TlsPaths,
    namespace: Namespace,
    cgroup: Option<Cgroup>,
    daemon: Mutex<Option<Child>>,
}

impl LabHost {
    pub(crate) fn create(
        spec: HostSpec,
        address: Ipv4Addr,
        directory: PathBuf,
        namespace: Namespace,
        cgroup: Option<Cgroup>,
        tls: TlsPaths,
    ) -> LabResult<Self> {
        std::fs::create_dir_all(&directory).map_err(LabError::io("create", &directory))?;
        Ok(Self { spec, address, directory, tls, namespace, cgroup, daemon: Mutex::new(None) })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Its pool.
    pub fn pool(&self) -> &str {
        &self.spec.pool
    }

    /// What it was made from.
    pub fn spec(&self) -> &HostSpec {
        &self.spec
    }

    /// Its address on the fabric.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its files: `hostd.json`, `hostd.log`, `hostd.sock`, `run`, `state`.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its identity.
    pub fn tls(&self) -> &TlsPaths {
        &self.tls
    }

    /// Its network namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its control group, where there is one.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// The daemon's control socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("hostd.sock")
    }

    /// A client of its daemon. The socket is a file: no namespace needs to be entered.
    pub fn client(&self) -> Client {
        Client::new(self.socket())
    }

    /// The daemon's configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.directory.join("hostd.json")
    }

    /// The daemon's log.
    pub fn log_path(&self) -> PathBuf {
        self.directory.join("hostd.log")
    }

    /// The configuration of this host's daemon, with `peers` to deal with, before the caller's adjustments.
    pub fn default_config(&self, peers: Vec<PeerConfig>, vmm: PathBuf) -> HostConfig {
        HostConfig {
            host: self.spec.name.clone(),
            pool: self.spec.pool.clone(),
            run_dir: self.directory.join("run"),
            state_dir: self.directory.join("state"),
            shared_dirs: Vec::new(),
            image_dirs: Vec::new(),
            socket: self.socket(),
            socket_group: None,
            listen: SocketAddr::from((self.address, PEER_PORT)),
            migration_address: self.address.into(),
            tls: self.tls.clone(),
            vmm: Some(vmm),
            capacity: CapacityConfig {
                cpu_cores: self.spec.cpu_cores,
                memory_mib: self.spec.memory_mib,
                ..CapacityConfig::default()
            },
            peers,
            bridge: Some(super::fabric::HOST_BRIDGE.to_owned()),
            sample_interval_ms: 1000,
            planner: crate::config::PlannerConfig::default(),
            concurrent_migrations: 2,
            migration: Default::default(),
            access: Vec::new(),
        }
    }

    /// This host as its peers know it.
    pub fn as_peer(&self) -> PeerConfig {
        PeerConfig {
            host: self.spec.name.clone(),
            pool: self.spec.pool.clone(),
            address: SocketAddr::from((self.address, PEER_PORT)),
        }
    }

    /// A command that will run on this host: in its namespace, its control group and a process group of its own (so that
    /// Ctrl-C at the terminal reaches only the one who cleans up).
    ///
    /// # Errors
    /// When namespace or control group are gone.
    pub fn command(&self, program: &Path) -> LabResult<Command> {
        let mut command = Command::new(program);
        self.namespace.place(&mut command)?;
        if let Some(cgroup) = &self.cgroup {
            cgroup.place(&mut command)?;
        }
        command.process_group(0).stdin(Stdio::null());
        Ok(command)
    }

    /// Writes the configuration file; takes effect at the next start of the daemon.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_config(&self, config: &HostConfig) -> LabResult<()> {
        let path = self.config_path();
        let text = serde_json::to_vec_pretty(config).map_err(|error| LabError::Io {
            action: "encode",
            path: path.clone(),
            source: error.into(),
        })?;
        std::fs::write(&path, text).map_err(LabError::io("write", path))
    }

    /// Starts the daemon; [`LabHost::wait_ready`] waits for it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn_daemon(&self, program: &Path) -> LabResult<()> {
        let path = self.log_path();
        let log = File::options().create(true).append(true).open(&path).map_err(LabError::io("open", &path))?;
        let errors = log.try_clone().map_err(LabError::io("open", &path))?;
        let mut command = self.command(program)?;
        command.arg("--config").arg(self.config_path()).stdout(log).stderr(errors);
        let child =
            command.spawn().map_err(|source| LabError::Tool { program: program.display().to_string(), source })?;
        *self.daemon() = Some(child);
        Ok(())
    }

    /// Waits until the daemon accepts connections on its control socket.
    ///
    /// # Errors
    /// [`LabError::Daemon`] with the end of its log if it ended or took too long.
    pub fn wait_ready(&self) -> LabResult<()> {
        let socket = self.socket();
        let ready = interrupt::poll("hostd", READY_DEADLINE, Duration::from_millis(5), || {
            if let Some(status) = self.daemon().as_mut().and_then(|child| child.try_wait().ok().flatten()) {
                return Err(self.failed(format!("ended with {status}")));
            }
            Ok(std::os::unix::net::UnixStream::connect(&socket).ok())
        });
        match ready {
            Ok(_) => Ok(()),
            Err(LabError::Deadline { waited, .. }) => Err(self.failed(format!("was not ready after {waited:?}"))),
            Err(error) => Err(error),
        }
    }

    /// Process id of the daemon, while it has not been waited for.
    pub fn daemon_pid(&self) -> Option<u32> {
        self.daemon().as_ref().map(Child::id)
    }

    /// Sends SIGTERM to the daemon and waits until it has ended; true if it did so within `deadline` and without an error.
    /// Its machines are its own business. Otherwise it is killed.
    pub fn stop_daemon(&self, deadline: Duration) -> bool {
        let Some(mut child) = self.daemon().take() else { return true };
        signal(&child, Signal::SIGTERM);
        let end = Instant::now() + deadline;
        loop {
            match child.try_wait() {
                Ok(Some(status)) => return status.success(),
                Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                _ => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return false;
                }
            }
        }
    }

    /// Kills the daemon, as a crash would, and nothing else.
    pub fn kill_daemon(&self) {
        if let Some(mut child) = self.daemon().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The last lines of the daemon's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    fn daemon(&self) -> MutexGuard<'_, Option<Child>> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, what: String) -> LabError {
        LabError::Daemon {
            program: "hostd".to_owned(),
            host: self.spec.name.clone(),
            what,
            log_path: self.log_path(),
            log: self.log_tail(20),
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    if let Ok(pid) = i32::try_from(child.id()) {
        // A child that has ended and was not waited for keeps its number: this cannot hit another process.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
    }
}
