//! The process from outside: its API, its arguments, and what it makes of bad input.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Lab, Vmm, ready, until};
use serde_json::{Value, json};
use vmm::api::{MachineState, Problem};
use vmm::config::{ReceiveConfig, TlsIdentity};

const IDLE: &str = "hb=100";

/// A machine without disk and network.
fn plain(lab: &Lab) -> Value {
    json!({"name": "vm1", "memory_mib": 32, "kernel": lab.kernel, "cmdline": IDLE})
}

fn raw(vmm: &Vmm, request: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(&vmm.socket).expect("a connection");
    // The server may answer and close before all is written.
    let _ = stream.write_all(request);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

fn problem(answer: &[u8]) -> Problem {
    let text = String::from_utf8_lossy(answer);
    let body = text.split("\r\n\r\n").nth(1).unwrap_or_else(|| panic!("no answer: {text:?}"));
    assert!(text.contains("application/problem+json"), "{text}");
    serde_json::from_str(body).expect("a problem document")
}

fn receive(listen: &str, token: &str) -> ReceiveConfig {
    ReceiveConfig {
        id: "m1".into(),
        listen: listen.parse().expect("an address"),
        token: token.into(),
        source_host: "a".into(),
        destination_host: "b".into(),
        tls: TlsIdentity { ca_pem: String::new(), certificate_pem: String::new(), key_pem: String::new() },
        deadline_s: 5,
        recover_s: 20,
        mark: None,
        reuse_disks: false,
    }
}

fn run(arguments: &[&str], config: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_headroom-vmm"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("headroom-vmm starts");
    let _ = child.stdin.take().expect("a pipe").write_all(config.as_bytes());
    child.wait_with_output().expect("it ends")
}

#[test]
fn a_machine_is_watched_paused_resumed_and_ended() {
    if !ready("a_machine_is_watched_paused_resumed_and_ended") {
        return;
    }
    let lab = Lab::new();
    let vmm = lab.vmm("vmm", &plain(&lab), &[]);
    let info = until("the first instruction", Duration::from_secs(5), || {
        vmm.client.machine().ok().filter(|info| info.first_instruction_us.is_some())
    });
    assert_eq!((info.name.as_str(), info.state, info.memory_bytes), ("vm1", MachineState::Running, 32 << 20));
    let before = vmm.client.metrics().expect("metrics");
    until("processor time", Duration::from_secs(10), || {
        let now = vmm.client.metrics().expect("metrics");
        (now.vcpu_us > before.vcpu_us && now.overhead_bytes > 0 && now.memory_resident_bytes > 0).then_some(())
    });
    assert_eq!(vmm.client.digest().expect_err("it runs").status(), Some(409));
    assert_eq!(vmm.client.pause().expect("paused").state, MachineState::Paused);
    assert_eq!(vmm.client.pause().expect("twice is once").state, MachineState::Paused);
    assert_eq!(vmm.client.digest().expect("a digest"), vmm.client.digest().expect("the same"));
    assert_eq!(vmm.client.resume().expect("resumed").state, MachineState::Running);
    assert_eq!(vmm.client.migration().expect("an answer"), None);
    assert_eq!(vmm.client.cancel_migration().expect_err("none").status(), Some(404));
    assert_eq!(vmm.client.settle(vmm::api::Settle::RunsHere).expect_err("no doubt").status(), Some(409));
    assert_eq!(
        vmm.client.receive(&receive("127.0.0.1:0", &"00".repeat(32))).expect_err("occupied").status(),
        Some(409)
    );
    let socket = vmm.socket.clone();
    assert_eq!(vmm.quit(), Some(0));
    assert!(!socket.exists(), "the socket is left behind");
}

#[test]
fn bad_requests_get_problem_documents() {
    if !ready("bad_requests_get_problem_documents") {
        return;
    }
    let lab = Lab::new();
    let vmm = lab.vmm("vmm", &plain(&lab), &[]);
    let status = |request: &[u8]| problem(&raw(&vmm, request)).status;
    assert_eq!(status(b"\x16\x03\x01 this is TLS\r\n\r\n"), 400);
    assert_eq!(status(b"GET /v1/machine"), 400);
    assert_eq!(status(b"GET /v2 HTTP/1.1\r\n\r\n"), 404);
    assert_eq!(status(b"PATCH /v1/machine HTTP/1.1\r\n\r\n"), 405);
    assert_eq!(status(b"PUT /v1/machine/save HTTP/1.1\r\nContent-Length: two\r\n\r\n{}"), 400);
    assert_eq!(status(b"PUT /v1/machine/save HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"), 422);
    assert_eq!(status(b"PUT /v1/machine/save HTTP/1.1\r\nContent-Length: 9\r\n\r\n{}"), 400);
    assert_eq!(status(b"PUT /v1/machine/save HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), 411);
    assert_eq!(status(b"PUT /v1/machine/save HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n"), 413);
    assert_eq!(status(&[b"GET /v1/machine HTTP/1.1\r\nx: ".as_slice(), &[b'y'; 9000]].concat()), 431);
    let body = br#"{"path": 3}"#;
    let save =
        [format!("PUT /v1/machine/save HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), body].concat();
    assert!(problem(&raw(&vmm, &save)).detail.contains("invalid type"));
    assert_eq!(vmm.state(), MachineState::Running);
}

#[test]
fn a_slow_client_is_cut_off_and_blocks_nobody() {
    if !ready("a_slow_client_is_cut_off_and_blocks_nobody") {
        return;
    }
    let lab = Lab::new();
    let vmm = lab.vmm("vmm", &plain(&lab), &[]);
    let mut slow = UnixStream::connect(&vmm.socket).expect("a connection");
    slow.write_all(b"GET /v1/mach").expect("written");
    let start = Instant::now();
    assert_eq!(vmm.state(), MachineState::Running);
    let mut answer = Vec::new();
    slow.set_read_timeout(Some(Duration::from_secs(30))).expect("a deadline");
    slow.read_to_end(&mut answer).expect("it is closed");
    assert_eq!(problem(&answer).status, 408);
    assert!(start.elapsed() >= Duration::from_secs(4));
}

#[test]
fn an_empty_vmm_refuses_what_needs_a_machine_and_a_busy_port() {
    if !ready("an_empty_vmm_refuses_what_needs_a_machine_and_a_busy_port") {
        return;
    }
    let lab = Lab::new();
    let vmm = lab.vmm("vmm", &plain(&lab), &["--incoming"]);
    assert_eq!(vmm.client.pause().expect_err("empty").status(), Some(409));
    let token = "00".repeat(32);
    assert_eq!(vmm.client.receive(&receive("127.0.0.1:0", "beef")).expect_err("token").status(), Some(422));
    let busy = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = busy.local_addr().expect("its address").to_string();
    let refused = vmm.client.receive(&receive(&address, &token)).expect_err("busy");
    assert!(refused.to_string().contains("choose a free port"), "{refused}");
    // Nobody comes: the next attempt is possible.
    assert!(vmm.client.receive(&receive("127.0.0.1:0", &token)).is_ok());
    let status = vmm.migrated();
    assert!(status.error.is_some() && !status.committed);
    assert_eq!(vmm.state(), MachineState::Incoming);
    assert!(vmm.client.receive(&receive("127.0.0.1:0", &token)).is_ok());
}

#[test]
fn wrong_configurations_end_with_one_clear_line() {
    if !ready("wrong_configurations_end_with_one_clear_line") {
        return;
    }
    let lab = Lab::new();
    let with = |changes: Value| {
        let mut config = plain(&lab);
        config.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
        config.to_string()
    };
    let disk = |path: &str| with(json!({"disks": [{"id": "disk0", "path": path}]}));
    let cases = [
        ("{".to_owned(), "is not one of a machine"),
        (with(json!({"memory": 5})), "unknown field `memory`"),
        (with(json!({"name": "a/b"})), "letters, digits"),
        (with(json!({"vcpus": 0})), "1 to 64"),
        (with(json!({"memory_mib": 8})), "16 to 1048576"),
        (with(json!({"kernel": "/nonexistent/vmlinux"})), "/nonexistent/vmlinux"),
        (with(json!({"kernel": "/etc/passwd"})), "is not a kernel"),
        (with(json!({"kernel": null})), "names no kernel"),
        (with(json!({"cmdline": "x".repeat(3000)})), "shorten"),
        (disk("/nonexistent/disk.raw"), "/nonexistent/disk.raw"),
        (with(json!({"networks": [{"id": "net0", "tap": "no-such-tap", "mac": "02:00:00:00:00:05"}]})), "no-such-tap"),
        (with(json!({"serial": {"file": "/nonexistent/console"}})), "/nonexistent/console"),
    ];
    for (config, expected) in cases {
        let output = run(&["--config", "-"], &config);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{config}: {text}");
        assert_eq!(text.lines().count(), 1, "{config}: {text}");
        assert!(text.contains(expected), "{config}: {text}");
    }
    assert_eq!(run(&["--no-such-option"], "").status.code(), Some(2));
    assert_eq!(run(&[], "").status.code(), Some(2));
}

#[test]
fn a_socket_in_use_is_not_stolen_and_a_dead_one_is_replaced() {
    if !ready("a_socket_in_use_is_not_stolen_and_a_dead_one_is_replaced") {
        return;
    }
    let lab = Lab::new();
    let mut vmm = lab.vmm("vmm", &plain(&lab), &[]);
    let path = vmm.socket.to_str().expect("a path").to_owned();
    let output = run(&["--config", "-", "--api-socket", &path], &plain(&lab).to_string());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && text.contains("another process listens"), "{text}");
    assert_eq!(vmm.state(), MachineState::Running);
    vmm.child.kill().expect("killed");
    vmm.child.wait().expect("gone");
    assert!(vmm.socket.exists());
    assert_eq!(lab.vmm("vmm", &plain(&lab), &[]).quit(), Some(0));
}

#[test]
fn sigterm_ends_it_and_removes_the_socket() {
    if !ready("sigterm_ends_it_and_removes_the_socket") {
        return;
    }
    let lab = Lab::new();
    let mut vmm = lab.vmm("vmm", &plain(&lab), &[]);
    let pid = nix::unistd::Pid::from_raw(vmm.child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("sent");
    assert_eq!(vmm.child.wait().expect("it ends").code(), Some(0));
    assert!(!vmm.socket.exists());
}
