//! One migration between two `headroom-vmm` processes on two hosts of a lab.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hostd::lab::LabHost;
use migration::policy::MigrationMode;
use migration::report::Report;
use vmm::api::client::Client;
use vmm::api::{MachineInfo, MachineState, Metrics};
use vmm::config::{
    DirtyTracking, DiskConfig, DiskSource, MachineConfig, MigrationLimits, NetworkConfig, ReceiveConfig, SendConfig,
    SerialConfig, TapSource, TlsIdentity,
};

use crate::scenario::{DISK_MIB, DOWNTIME_LIMIT_MS, MEMORY_MIB, Scenario};
use crate::setting::Setting;
use crate::site::{self, GUEST_MAC, TAP};

/// Longest that one migration may take before the run counts as failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running `headroom-vmm`; dropping it ends the process.
pub struct Vmm {
    child: Child,
    client: Client,
}

impl Vmm {
    /// Starts one on `host`; with a kernel it boots, without it waits for a migration.
    pub fn start(host: &LabHost, scenario: Scenario, kernel: Option<PathBuf>) -> Result<Self> {
        let socket = host.directory().join("vmm.sock");
        let incoming = kernel.is_none();
        let config = config(host, scenario, kernel);
        let file = host.directory().join("machine.json");
        std::fs::write(&file, serde_json::to_vec(&config)?)?;
        if scenario.has_disk() && !host.directory().join("disk.raw").exists() {
            std::fs::File::create(host.directory().join("disk.raw"))?.set_len(DISK_MIB << 20)?;
        }
        let mut command = host.command(&hostd::lab::binary("headroom-vmm")?)?;
        command.arg("--config").arg(&file).arg("--api-socket").arg(&socket).args(["--log", "warn"]);
        if incoming {
            command.arg("--incoming");
        }
        let child = spawn(&mut command)?;
        let vmm = Self { child, client: Client::new(socket) };
        vmm.wait_state(if incoming { MachineState::Incoming } else { MachineState::Running })?;
        Ok(vmm)
    }

    fn wait_state(&self, wanted: MachineState) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.client.machine() {
                Ok(info) if info.state == wanted => return Ok(()),
                Ok(info) if Instant::now() > deadline => bail!("headroom-vmm is {:?}, not {wanted:?}", info.state),
                Err(error) if Instant::now() > deadline => return Err(error).context("headroom-vmm does not answer"),
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it says of its machine.
    pub fn info(&self) -> Result<MachineInfo> {
        Ok(self.client.machine()?)
    }

    /// Its counters.
    pub fn metrics(&self) -> Result<Metrics> {
        Ok(self.client.metrics()?)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(command: &mut Command) -> Result<Child> {
    command.spawn().with_context(|| format!("start {}", command.get_program().display()))
}

fn config(host: &LabHost, scenario: Scenario, kernel: Option<PathBuf>) -> MachineConfig {
    let disks = if scenario.has_disk() {
        let path = host.directory().join("disk.raw");
        vec![DiskConfig { id: "disk0".into(), source: DiskSource::Path(path), read_only: false, shared: false }]
    } else {
        Vec::new()
    };
    MachineConfig {
        name: "bench".into(),
        vcpus: 1,
        memory_mib: MEMORY_MIB,
        kernel,
        initrd: None,
        cmdline: site::workload(scenario).to_string(),
        disks,
        networks: vec![NetworkConfig { id: "net0".into(), source: TapSource::Tap(TAP.into()), mac: GUEST_MAC.into() }],
        balloon: None,
        serial: SerialConfig::File(host.directory().join("serial.log")),
        dirty_tracking: DirtyTracking::default(),
    }
}

fn identity(host: &LabHost) -> Result<TlsIdentity> {
    let read = |path: &Path| std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()));
    let tls = host.tls();
    Ok(TlsIdentity { ca_pem: read(&tls.ca)?, certificate_pem: read(&tls.certificate)?, key_pem: read(&tls.key)? })
}

/// Moves the machine of `source` into `destination` and returns the source's report.
pub fn migrate(
    source: (&LabHost, &Vmm),
    destination: (&LabHost, &Vmm),
    setting: &Setting,
    mode: MigrationMode,
) -> Result<Report> {
    let (id, token) = ("bench", "5a".repeat(32));
    let receiving = destination.1.client.receive(&ReceiveConfig {
        id: id.into(),
        listen: SocketAddr::new(IpAddr::V4(destination.0.address()), 0),
        token: token.clone(),
        source_host: source.0.name().into(),
        destination_host: destination.0.name().into(),
        tls: identity(destination.0)?,
        deadline_s: PATIENCE.as_secs(),
        recover_s: PATIENCE.as_secs(),
        mark: None,
        reuse_disks: false,
    })?;
    let limits = MigrationLimits::default();
    let streams = setting.streams.unwrap_or(limits.streams);
    let limits = MigrationLimits { streams, downtime_ms: DOWNTIME_LIMIT_MS, mode, ..limits };
    source.1.client.send(&SendConfig {
        id: id.into(),
        address: setting.link.route(destination.0, receiving.address)?,
        token,
        source_host: source.0.name().into(),
        destination_host: destination.0.name().into(),
        tls: identity(source.0)?,
        limits,
        pause_before_switchover: false,
        trigger: migration::report::Trigger::default(),
    })?;
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(report) = source.1.client.migration()?.and_then(|status| status.report) {
            return Ok(report);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!("the migration did not end within {} s", PATIENCE.as_secs())
}
