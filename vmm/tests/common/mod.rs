//! A small host for the tests: a network namespace of the test's thread, taps on a bridge, VMM processes.
#![allow(dead_code, missing_docs, reason = "each test binary uses a part")]

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use headroom_guest::Client as Guest;
use migration::testing::Authority;
use vmm::api::client::Client;
use vmm::api::{MachineState, MigrationStatus, Phase};
use vmm::config::{MigrationLimits, ReceiveConfig, SendConfig, TlsIdentity};

/// The one-time secret of every migration here.
pub const TOKEN: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

/// A certificate of `host`.
pub fn identity(authority: &Authority, host: &str) -> TlsIdentity {
    let identity = authority.issue(host);
    TlsIdentity { ca_pem: identity.ca_pem, certificate_pem: identity.certificate_pem, key_pem: identity.key_pem }
}

/// A client of the guest, which has 10.0.0.2.
pub fn guest() -> Guest {
    let mut guest = Guest::connect("10.0.0.2:9000".parse().expect("an address")).expect("a socket");
    guest.set_deadline(Duration::from_secs(20));
    guest
}

/// Has `to` listen as host `b` for host `a`.
pub fn listen(authority: &Authority, to: &Vmm, id: &str, recover_s: u64) -> SocketAddr {
    let config = ReceiveConfig {
        id: id.into(),
        listen: "127.0.0.1:0".parse().expect("an address"),
        token: TOKEN.into(),
        source_host: "a".into(),
        destination_host: "b".into(),
        tls: identity(authority, "b"),
        deadline_s: 60,
        recover_s,
        mark: Some(to.mark()),
        reuse_disks: false,
    };
    let address = to.client.receive(&config).expect("it listens").address;
    assert_eq!(std::fs::read(to.mark()).expect("a mark"), b"", "nothing has run there");
    address
}

/// What host `a` is told to send.
pub fn sending(authority: &Authority, id: &str, address: SocketAddr, limits: MigrationLimits) -> SendConfig {
    SendConfig {
        id: id.into(),
        address,
        token: TOKEN.into(),
        source_host: "a".into(),
        destination_host: "b".into(),
        tls: identity(authority, "a"),
        limits,
        pause_before_switchover: false,
        trigger: Default::default(),
    }
}

/// True if machines can run here; otherwise says why the test is skipped, or fails where that is not allowed.
pub fn ready(test: &str) -> bool {
    let missing = match vmm::kvm::Host::open() {
        Err(error) => error.to_string(),
        Ok(_) if !nix::unistd::geteuid().is_root() => "root is needed for network namespaces and taps".into(),
        Ok(_) => return true,
    };
    let required = std::env::var_os("HEADROOM_REQUIRE_KVM").is_some_and(|value| value == "1");
    assert!(!required, "HEADROOM_REQUIRE_KVM=1 is set and {missing}");
    eprintln!("skipped {test}: {missing}");
    false
}

/// Polls until `check` gives a value.
pub fn until<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(start.elapsed() < limit, "{what} did not happen within {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("ip (iproute2) runs");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A directory and a network of its own. The namespace goes with the test's thread and its processes.
pub struct Lab {
    pub directory: tempfile::TempDir,
    pub kernel: PathBuf,
}

impl Lab {
    pub fn new() -> Self {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace");
        ip("link set lo up");
        ip("link add br0 type bridge");
        ip("addr add 10.0.0.1/24 dev br0");
        ip("link set br0 up");
        let directory = tempfile::tempdir().expect("a directory");
        let kernel = directory.path().join("guest.elf");
        std::fs::write(&kernel, headroom_guest::IMAGE).expect("the image is written");
        Self { directory, kernel }
    }

    /// A tap on the bridge.
    pub fn tap(&self, name: &str) {
        ip(&format!("tuntap add {name} mode tap vnet_hdr"));
        ip(&format!("link set {name} master br0 up"));
    }

    pub fn disk(&self, name: &str, mib: u64) -> PathBuf {
        let path = self.directory.path().join(name);
        let file = std::fs::File::create(&path).expect("a disk");
        file.set_len(mib << 20).expect("its size");
        path
    }

    /// The configuration of the bundled guest on `tap` and `disk`.
    pub fn config(&self, memory_mib: u64, workload: &str, tap: &str, disk: &Path) -> serde_json::Value {
        serde_json::json!({
            "name": "vm1", "memory_mib": memory_mib, "kernel": self.kernel, "cmdline": workload,
            "disks": [{"id": "disk0", "path": disk}],
            "networks": [{"id": "net0", "tap": tap, "mac": "02:00:00:00:00:05"}],
            "serial": {"file": self.directory.path().join(format!("serial-{tap}"))},
        })
    }

    pub fn serial(&self, tap: &str) -> String {
        std::fs::read_to_string(self.directory.path().join(format!("serial-{tap}"))).unwrap_or_default()
    }

    pub fn vmm(&self, name: &str, config: &serde_json::Value, arguments: &[&str]) -> Vmm {
        let socket = self.directory.path().join(format!("{name}.sock"));
        let child = start(&socket, config, arguments, Stdio::inherit());
        let vmm = Vmm { child, client: Client::new(&socket), socket };
        until("the API socket", Duration::from_secs(20), || vmm.client.machine().ok());
        vmm
    }

    /// What a VMM that refuses its configuration says.
    pub fn refused(&self, config: &serde_json::Value) -> String {
        let child = start(&self.directory.path().join("refused.sock"), config, &[], Stdio::piped());
        let output = child.wait_with_output().expect("it ends");
        assert!(!output.status.success(), "it was not refused");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

fn start(socket: &Path, config: &serde_json::Value, arguments: &[&str], stderr: Stdio) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_headroom-vmm"))
        .args(["--config", "-", "--api-socket"])
        .arg(socket)
        .args(arguments)
        .stdin(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .expect("headroom-vmm starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(config.to_string().as_bytes()).expect("the configuration is read");
    child
}

/// A VMM process; killed with the test.
pub struct Vmm {
    pub child: Child,
    pub client: Client,
    pub socket: PathBuf,
}

impl Vmm {
    pub fn state(&self) -> MachineState {
        self.client.machine().expect("an answer").state
    }

    /// Where it notes that a machine has run in it.
    pub fn mark(&self) -> PathBuf {
        self.socket.with_extension("arrived")
    }

    /// Waits for the end of the migration.
    pub fn migrated(&self) -> MigrationStatus {
        until("the end of the migration", Duration::from_secs(120), || {
            let status = self.client.migration().expect("an answer").expect("a migration");
            (status.phase == Phase::Ended).then_some(status)
        })
    }

    /// Asks it to end and returns its exit code.
    pub fn quit(mut self) -> Option<i32> {
        self.client.quit().expect("an answer");
        self.child.wait().expect("it ends").code()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
