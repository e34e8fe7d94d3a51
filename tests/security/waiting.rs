//! A VMM of its own on a host, without a daemon: it waits for a machine, or runs one.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use hostd::config::TlsPaths;
use hostd::lab::{LabHost, binary, interrupt};
use tests::world::DEADLINE;
use vmm::api::MachineState;
use vmm::api::client::Client;
use vmm::config::{MachineConfig, ReceiveConfig, TlsIdentity};

/// The secret of the one migration that these tests make.
pub const TOKEN: [u8; 32] = *b"one secret of thirty-two bytes ,";

/// A VMM of its own on a host, without a daemon.
pub struct Vmm {
    child: Child,
    /// Its API.
    pub client: Client,
}

impl Vmm {
    /// Starts it and waits until it runs its machine, or waits for one.
    pub fn start(host: &LabHost, name: &str, incoming: bool) -> Self {
        let folder = host.directory();
        let config = config(host, name, incoming);
        let config_path = folder.join(format!("{name}.json"));
        std::fs::write(&config_path, serde_json::to_vec(&config).unwrap()).unwrap();
        let socket = folder.join(format!("{name}.sock"));
        let mut command = host.command(&binary("headroom-vmm").unwrap()).unwrap();
        command.arg("--config").arg(config_path).arg("--api-socket").arg(&socket);
        if incoming {
            command.arg("--incoming");
        }
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let client = Client::new(socket);
        let wanted = if incoming { MachineState::Incoming } else { MachineState::Running };
        interrupt::poll("the VMM", DEADLINE, Duration::from_millis(5), || {
            Ok(client.machine().ok().filter(|machine| machine.state == wanted))
        })
        .unwrap();
        Self { child, client }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The identity at these paths.
pub fn identity(paths: &TlsPaths) -> TlsIdentity {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap();
    TlsIdentity { ca_pem: read(&paths.ca), certificate_pem: read(&paths.certificate), key_pem: read(&paths.key) }
}

/// The configuration of a machine with one disk, whose files are made.
pub fn config(host: &LabHost, name: &str, incoming: bool) -> MachineConfig {
    let folder = host.directory();
    let kernel = folder.join("guest.elf");
    std::fs::write(&kernel, headroom_guest::IMAGE).unwrap();
    let disk = folder.join(format!("{name}.raw"));
    std::fs::File::create(&disk).unwrap().set_len(32 << 20).unwrap();
    serde_json::from_value(serde_json::json!({
        "name": "vm1", "memory_mib": 96, "kernel": (!incoming).then_some(kernel),
        "cmdline": "sweep=16:32 disk=8:4 fill=16", "disks": [{"id": "disk0", "path": disk}],
    }))
    .unwrap()
}

/// What a VMM on `host` is told to wait for: `mig-1` from `a1`.
pub fn receive_config(host: &LabHost) -> ReceiveConfig {
    ReceiveConfig {
        id: "mig-1".into(),
        listen: (host.address(), 0).into(),
        token: hex(&TOKEN),
        source_host: "a1".into(),
        destination_host: host.name().into(),
        tls: identity(host.tls()),
        deadline_s: 120,
        recover_s: 20,
        mark: None,
        reuse_disks: false,
    }
}

/// In the API's spelling.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
