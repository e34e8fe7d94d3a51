//! The peer: the same guest image on Debian's QEMU (`microvm`), migrated over plain TCP.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hostd::lab::LabHost;
use migration::policy::MigrationMode;
use serde_json::json;

use crate::qmp::Qmp;
use crate::scenario::{DOWNTIME_LIMIT_MS, MEMORY_MIB, Scenario};
use crate::setting::Setting;
use crate::site::{self, GUEST_MAC, TAP};

const PROGRAM: &str = "qemu-system-x86_64";
const PORT: u16 = 4444;

/// A running QEMU; dropping it ends the process.
pub struct Qemu {
    child: Child,
    qmp: Qmp,
}

/// What QEMU says of one migration.
pub struct Moved {
    /// `total-time` of `query-migrate`.
    pub total_ms: f64,
    /// `downtime` of `query-migrate`.
    pub downtime_ms: f64,
}

impl Qemu {
    /// First line of `--version`.
    pub fn version() -> Result<String> {
        let output = std::process::Command::new(PROGRAM)
            .arg("--version")
            .output()
            .with_context(|| format!("start {PROGRAM}: install Debian's qemu-system-x86, or leave out --peer qemu"))?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
    }

    /// Starts one on `host`: booting `kernel`, or waiting for a migration if `incoming`.
    pub fn start(host: &LabHost, scenario: Scenario, kernel: &Path, incoming: bool) -> Result<Self> {
        let socket: PathBuf = host.directory().join("qmp.sock");
        let mut command = host.command(Path::new("/usr/bin").join(PROGRAM).as_path())?;
        command
            .args(["-M", "microvm,acpi=off", "-enable-kvm", "-cpu", "host", "-smp", "1", "-nodefaults"])
            .args([
                "-name",
                "bench,debug-threads=on",
                "-display",
                "none",
                "-no-user-config",
                "-global",
                "virtio-mmio.force-legacy=false",
            ])
            .args(["-m", &MEMORY_MIB.to_string()])
            .arg("-kernel")
            .arg(kernel)
            .args(["-append", &site::workload(scenario).to_string()])
            .args(["-netdev", &format!("tap,id=net0,ifname={TAP},script=no,downscript=no")])
            .args(["-device", &format!("virtio-net-device,netdev=net0,mac={GUEST_MAC}")])
            .args(["-serial", &format!("file:{}", host.directory().join("qemu-serial.log").display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .stdin(Stdio::null());
        if incoming {
            // Where it listens is said once its capabilities are set.
            command.args(["-incoming", "defer"]);
        }
        let child = command.spawn().with_context(|| format!("start {PROGRAM}"))?;
        let qmp = Qmp::connect(&socket, Duration::from_secs(10))?;
        Ok(Self { child, qmp })
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Moves this machine to the QEMU that waits on `host`, with no limit on bandwidth: by pre-copy, over several connections
    /// (multifd) if more than one is asked for, or by post-copy after one round.
    pub fn migrate(
        &mut self,
        (host, destination): (&LabHost, &mut Self),
        setting: &Setting,
        mode: MigrationMode,
    ) -> Result<Moved> {
        let streams = setting.streams.unwrap_or(1);
        let postcopy = mode == MigrationMode::Postcopy;
        // This release cannot do both at once.
        let multifd = streams > 1 && !postcopy;
        for side in [&mut *self, destination] {
            let capability = |name: &str, state: bool| json!({"capability": name, "state": state});
            let capabilities = [capability("postcopy-ram", postcopy), capability("multifd", multifd)];
            side.qmp.execute("migrate-set-capabilities", &json!({"capabilities": capabilities}))?;
            side.qmp.execute("migrate-set-parameters", &json!({"multifd-channels": streams}))?;
        }
        let limits = json!({"max-bandwidth": 100_000_000_000_u64, "downtime-limit": DOWNTIME_LIMIT_MS});
        self.qmp.execute("migrate-set-parameters", &limits)?;
        let uri = format!("tcp:{}:{PORT}", host.address());
        destination.qmp.execute("migrate-incoming", &json!({"uri": uri}))?;
        let uri = format!("tcp:{}", setting.link.route(host, SocketAddr::new(host.address().into(), PORT))?);
        self.qmp.execute("migrate", &json!({"uri": uri}))?;
        let (deadline, mut asked) = (Instant::now() + Duration::from_secs(60), !postcopy);
        while Instant::now() < deadline {
            let status = self.qmp.execute("query-migrate", &json!({}))?;
            match status["status"].as_str() {
                // For a moment it is completed with figures that are still zero.
                Some("completed") if status["total-time"].as_f64().is_some_and(|ms| ms > 0.0) => {
                    return Ok(Moved {
                        total_ms: status["total-time"].as_f64().unwrap_or_default(),
                        downtime_ms: status["downtime"].as_f64().unwrap_or_default(),
                    });
                }
                Some("failed" | "cancelled") => bail!("QEMU's migration failed: {status}"),
                // The count is two when the first round is over.
                Some("active") if !asked && status["ram"]["dirty-sync-count"].as_u64() >= Some(2) => {
                    self.qmp.execute("migrate-start-postcopy", &json!({}))?;
                    asked = true;
                }
                _ => std::thread::sleep(Duration::from_millis(if asked { 20 } else { 2 })),
            }
        }
        bail!("QEMU's migration did not end within 60 s")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
