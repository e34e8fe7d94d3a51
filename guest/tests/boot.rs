//! The image at work, on a VMM that is not ours: QEMU's microvm with its own user-mode network, on KVM and on QEMU's own
//! processor, whose ring 0 is that of real hardware wherever this runs.
//!
//! Skipped, with a message, where QEMU is not installed; where there is no KVM too, unless `HEADROOM_REQUIRE_KVM=1`.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use headroom_guest::{Client, IMAGE, READY, Request, Settings, Status, Workload};

const QEMU: &str = "qemu-system-x86_64";
/// Far more than anything here takes: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether a guest can be run here.
fn can_run() -> bool {
    if !Path::new("/dev/kvm").exists() {
        assert!(std::env::var_os("HEADROOM_REQUIRE_KVM").is_none_or(|value| value != "1"), "there is no /dev/kvm");
        eprintln!("skipped: there is no /dev/kvm");
        return false;
    }
    let found = Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !found {
        eprintln!("skipped: {QEMU} is not installed (Debian: qemu-system-x86)");
    }
    found
}

/// A port that is free now.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback socket");
    listener.local_addr().expect("its address").port()
}

/// Who runs the guest's instructions, and as which processor.
type Processor = [&'static str; 2];
const KVM: Processor = ["kvm", "host"];
const EMULATED: Processor = ["tcg", "max"];

/// A running guest; dropping it ends it.
struct Machine {
    qemu: Child,
    serial: Receiver<String>,
    control: SocketAddr,
    echo: SocketAddr,
    _files: tempfile::TempDir,
}

impl Machine {
    fn start([accelerator, processor]: Processor, workload: &Workload) -> Self {
        let files = tempfile::tempdir().expect("a temporary directory");
        let (kernel, disk) = (files.path().join("image"), files.path().join("disk"));
        std::fs::write(&kernel, IMAGE).expect("room for the image");
        File::create(&disk).and_then(|file| file.set_len(32 << 20)).expect("room for the disk");
        let (control, echo) = (free_port(), free_port());
        let forward: String = [("udp", control, 9000), ("tcp", control, 9000), ("udp", echo, 7), ("tcp", echo, 7)]
            .iter()
            .map(|(protocol, host, guest)| format!(",hostfwd={protocol}:127.0.0.1:{host}-10.0.2.15:{guest}"))
            .collect();
        let mut qemu = Command::new(QEMU)
            .args(["-M", "microvm,acpi=off,auto-kernel-cmdline=on", "-m", "192"])
            .args(["-accel", accelerator, "-cpu", processor])
            .args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-global", "virtio-mmio.force-legacy=false", "-kernel"])
            .arg(&kernel)
            .args(["-append", &format!("ip=10.0.2.15/24 gw=10.0.2.2 {workload}")])
            .args(["-drive", &format!("id=disk0,if=none,format=raw,file={}", disk.display())])
            .args(["-device", "virtio-blk-device,drive=disk0", "-device", "virtio-net-device,netdev=net0"])
            .args(["-netdev", &format!("user,id=net0{forward}")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("QEMU starts");
        let lines = BufReader::new(qemu.stdout.take().expect("a pipe")).lines();
        let (sender, serial) = channel();
        thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Self { qemu, serial, control: at(control), echo: at(echo), _files: files }
    }

    /// Waits for a line with `text` on the serial port.
    fn expect_line(&self, text: &str) {
        let until = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        while let Ok(line) = self.serial.recv_timeout(until.saturating_duration_since(Instant::now())) {
            if line.contains(text) {
                return;
            }
            seen.push(line);
        }
        panic!("no {text:?} on the serial port: {seen:#?}");
    }

    fn client(&self) -> Client {
        let mut client = Client::connect(self.control).expect("a UDP socket");
        client.set_deadline(PATIENCE);
        client
    }

    /// Asks until the status is as wanted.
    fn expect_status(&self, what: &str, wanted: impl Fn(&Status) -> bool) -> Status {
        let (mut client, until) = (self.client(), Instant::now() + PATIENCE);
        loop {
            let status = client.status().expect("a status");
            if wanted(&status) {
                return status;
            }
            assert!(Instant::now() < until, "never {what}: {status:#?}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

#[test]
fn it_works_as_it_is_told() {
    if can_run() {
        works_as_told(KVM);
    }
}

#[test]
fn it_works_on_a_processor_whose_ring_0_is_not_kvms() {
    if can_run() {
        works_as_told(EMULATED);
    }
}

fn works_as_told(processor: Processor) {
    let workload = Workload { fill_mib: 32, sweep_mib: 16, sweep_mib_per_second: 64, ..Workload::default() };
    let machine = Machine::start(processor, &workload);
    machine.expect_line(READY);

    let swept = machine.expect_status("two passes of the sweeper", |status| status.sweep_pages_checked >= 2 * 16 * 256);
    assert_eq!((swept.sweep_errors, swept.fill_pages, swept.workload.fill_mib), (0, 32 * 256, 32));
    assert!(swept.ready && swept.sweep_step >= 3 && swept.uptime_ms > 0);

    let told = Settings {
        sweep_mib_per_second: Some(0),
        disk_mib: Some(4),
        disk_mib_per_second: Some(64),
        cpu_percent: Some(30),
        verify_fill: true,
        ..Settings::default()
    };
    let answer = machine.client().set(told).expect("an answer");
    assert_eq!((answer.workload.disk_mib, answer.workload.cpu_percent, answer.workload.sweep_mib), (4, 30, 16));
    let worked = machine.expect_status("three passes of the disk verifier and all filled pages", |status| {
        status.disk_blocks_checked >= 3 * 4 * 256 && status.fill_pages_checked == 32 * 256
    });
    assert_eq!((worked.disk_errors, worked.fill_errors, worked.sweep_errors), (0, 0, 0));
    assert!(worked.disk_flushes > 0 && worked.work_units > 0 && worked.heartbeat > swept.heartbeat);

    let too_much = Settings { sweep_mib: Some(1 << 20), disk_mib: Some(1 << 20), ..Settings::default() };
    let cut = machine.client().set(too_much).expect("an answer").workload;
    assert!(cut.sweep_mib < 192 - 32 && cut.disk_mib == 32, "{cut}");
}

#[test]
fn it_echoes_answers_several_clients_and_switches_off() {
    if !can_run() {
        return;
    }
    let mut machine = Machine::start(KVM, &Workload::default());
    machine.expect_line(READY);

    let socket = UdpSocket::bind("127.0.0.1:0").expect("a UDP socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("a socket option");
    let mut buffer = [0; 2048];
    for size in [1, 100, 1400] {
        let sent = vec![size as u8; size];
        socket.send_to(&sent, machine.echo).expect("room for a datagram");
        let received = socket.recv(&mut buffer).expect("an echo");
        assert_eq!(&buffer[..received], &sent[..]);
    }

    let mut streams: Vec<_> = (0..4).map(|_| TcpStream::connect(machine.echo).expect("a connection")).collect();
    for (index, stream) in streams.iter_mut().enumerate() {
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket option");
        let sent: Vec<u8> = (0..20_000_usize).map(|byte| (byte * 7 + index) as u8).collect();
        stream.write_all(&sent).expect("room in the window");
        let mut received = vec![0; sent.len()];
        stream.read_exact(&mut received).expect("an echo");
        assert!(received == sent, "connection {index}");
    }

    let mut clients = [0; 2].map(|_| Client::connect_tcp(machine.control).expect("a connection"));
    for client in &mut clients {
        client.set_deadline(PATIENCE);
        assert!(client.status().expect("a status").ready);
    }
    let status = clients[0].request(Request::default()).expect("an empty request is answered too");
    assert_eq!((status.sweep_errors, status.disk_errors), (0, 0));

    clients[1].set(Settings { power_off: true, ..Settings::default() }).expect("the answer comes before the end");
    let until = Instant::now() + PATIENCE;
    while machine.qemu.try_wait().expect("a child").is_none() {
        assert!(Instant::now() < until, "the machine is still on");
        thread::sleep(Duration::from_millis(20));
    }
}
