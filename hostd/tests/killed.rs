//! A daemon that is killed while it starts a machine's VMM: no process is left that the next one does not know of.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hostd::api::types::{CreateMachine, Disk, KernelChoice, MachineStatus, MigrationLimits};
use hostd::client::Client;
use hostd::config::HostConfig;
use hostd::machine::MachineRecord;
use hostd::security::pki;
use hostd::store::Store;
use hostd::store::embedded::Kind;

/// A host whose VMM reads its configuration as it should, and never answers.
struct Host {
    folder: tempfile::TempDir,
    config: HostConfig,
    daemon: Option<Child>,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        common::authority(folder.path());
        let tls = pki::issue(&folder.path().join("pki"), "a1").unwrap();
        let vmm = folder.path().join("vmm");
        let shown = folder.path().display();
        let script = format!(
            "#!/bin/sh\ncat > {shown}/config\ntest -s {shown}/config || exit 1\necho $$ > {shown}/pid\nexec sleep 600\n"
        );
        std::fs::write(&vmm, script).unwrap();
        std::fs::set_permissions(&vmm, std::fs::Permissions::from_mode(0o700)).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config =
            HostConfig { vmm: Some(vmm), listen: port, ..common::config(folder.path(), "a1", tls, Vec::new()) };
        std::fs::write(folder.path().join("hostd.json"), serde_json::to_vec(&config).unwrap()).unwrap();
        Self { folder, config, daemon: None }
    }

    async fn start(&mut self) -> Client {
        let daemon = Command::new(env!("CARGO_BIN_EXE_hostd"))
            .arg("--config")
            .arg(self.folder.path().join("hostd.json"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        self.daemon = Some(daemon);
        let client = Client::new(&self.config.socket);
        let deadline = Instant::now() + Duration::from_secs(20);
        while client.host().await.is_err() {
            assert!(Instant::now() < deadline, "the daemon does not answer");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        client
    }

    fn kill(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// Waits until the VMM was started, and returns its process id.
    async fn vmm(&self) -> u32 {
        let (path, deadline) = (self.folder.path().join("pid"), Instant::now() + Duration::from_secs(20));
        loop {
            if let Some(pid) = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok()) {
                return pid;
            }
            assert!(Instant::now() < deadline, "no VMM was started");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.daemon.is_some() {
            self.kill();
        }
        // A test that fails leaves none either.
        let pid =
            std::fs::read_to_string(self.folder.path().join("pid")).ok().and_then(|text| text.trim().parse().ok());
        if let Some(pid) = pid.filter(|pid| runs(*pid)) {
            let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    }
}

/// Whether a process runs; one that has ended and was not reaped does not.
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// The image of a disk of 1 MiB.
fn image(folder: &Path) -> PathBuf {
    folder.join("disk0.raw")
}

#[tokio::test]
async fn a_machine_that_was_being_made_is_gone_with_its_process() {
    let mut host = Host::new();
    let client = host.start().await;
    let new: CreateMachine =
        serde_json::from_str(r#"{"name": "vm1", "memory_mib": 64, "disks": [{"id": "disk0", "size_mib": 1}]}"#)
            .unwrap();
    let request = tokio::spawn(async move { client.create_machine(&new).await });
    let vmm = host.vmm().await;
    host.kill();
    assert!(request.await.unwrap().is_err() && runs(vmm), "it was being made");
    let client = host.start().await;
    assert!(client.machines().await.unwrap().is_empty());
    assert!(!runs(vmm), "its process is still there");
    assert!(!image(&host.config.machine_state_dir("vm1")).exists(), "its disk is still there");
}

#[tokio::test]
async fn a_machine_that_was_being_started_is_stopped_and_has_its_disks() {
    let mut host = Host::new();
    let folder = host.config.machine_state_dir("vm1");
    let record = MachineRecord {
        name: "vm1".into(),
        vcpus: 1,
        memory_mib: 64,
        kernel: KernelChoice::Bundled,
        initrd: None,
        cmdline: String::new(),
        disks: vec![Disk {
            id: "disk0".into(),
            path: image(&folder),
            bytes: 1 << 20,
            owned: true,
            read_only: false,
            shared: false,
        }],
        networks: Vec::new(),
        balloon: false,
        probes: Vec::new(),
        limits: MigrationLimits::default(),
        created_unix_ms: 0,
        status: MachineStatus::Stopped,
        process: None,
        migration: None,
        arrived: false,
        why_stopped: None,
        incomplete: false,
    };
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(image(&folder), vec![7; 1 << 20]).unwrap();
    let store = Store::open(&host.config.store_path()).unwrap();
    store.put(Kind::Machine, "vm1", &record).unwrap();
    drop(store);

    let client = host.start().await;
    let request = tokio::spawn(async move { client.start_machine("vm1").await });
    let vmm = host.vmm().await;
    let other = Client::new(&host.config.socket).delete_machine("vm1").await.unwrap_err();
    assert_eq!(other.status(), Some(409), "nobody else may have it meanwhile: {other}");
    host.kill();
    assert!(request.await.unwrap().is_err() && runs(vmm), "it was being started");
    let client = host.start().await;
    assert_eq!(client.machine("vm1").await.unwrap().status, MachineStatus::Stopped);
    assert!(!runs(vmm), "its process is still there");
    assert!(std::fs::read(image(&folder)).unwrap() == [7; 1 << 20], "its disk is not as it was");
}
