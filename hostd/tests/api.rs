//! The control API: what it answers to requests that are wrong.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod common;

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use common::{Host, authority, declared};
use hostd::api::types::{MigrateRequest, Problem};
use hostd::api::{control, router};
use hostd::client::ClientError;
use hostd::security::access::{AccessRule, Actor};
use hyper::{Method, Request};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tower::ServiceExt;

async fn host(rules: &str) -> (tempfile::TempDir, Host) {
    let folder = tempfile::tempdir().unwrap();
    authority(folder.path());
    let rules: Vec<AccessRule> = serde_json::from_str(rules).unwrap();
    let host = Host::start(folder.path(), "a1", vec![declared("b1", "b")], rules).await;
    (folder, host)
}

/// The problem that a request is answered with.
async fn problem(host: &Host, method: Method, path: &str, body: Option<Vec<u8>>) -> Problem {
    match host.client.exchange(method.clone(), path, body).await {
        Err(ClientError::Problem(problem)) => {
            assert!(problem.kind.starts_with("urn:headroom:problem:"), "{method} {path}: {problem:?}");
            problem
        }
        other => panic!("{method} {path}: {other:?} is no problem document"),
    }
}

fn machine(change: impl FnOnce(&mut Value)) -> Option<Vec<u8>> {
    let mut json = json!({"name": "vm1", "memory_mib": 64});
    change(&mut json);
    Some(json.to_string().into_bytes())
}

fn event(repeats: &str) -> Option<Vec<u8>> {
    let json = json!({"name": "x", "target": {"pool": "a"}, "starts_in_s": 60, "duration_s": 90, "adds": {"cpu_cores": 1.0},
        "repeats": repeats});
    Some(json.to_string().into_bytes())
}

#[tokio::test]
async fn an_event_that_comes_again_is_kept_with_its_rule() {
    let (_folder, host) = host("[]").await;
    let new = serde_json::from_slice(&event("FREQ=DAILY;BYDAY=MO,FR").unwrap()).unwrap();
    let declared = host.client.add_event(&new).await.unwrap();
    assert_eq!(declared.repeats.as_deref(), Some("FREQ=DAILY;BYDAY=MO,FR"));
    assert_eq!(host.client.events().await.unwrap(), [declared]);
    assert!(host.client.capacity(Some(0.01)).await.unwrap().iter().all(|pool| pool.risk == 0.01));
}

#[tokio::test]
async fn what_is_not_there_is_a_problem_document() {
    let (_folder, host) = host("[]").await;
    for (method, path, status) in [
        (Method::GET, "/", 404),
        (Method::GET, "/v1/nothing", 404),
        (Method::GET, "/v2/machines", 404),
        (Method::PUT, "/v1/machines", 405),
        (Method::DELETE, "/v1/host", 405),
        (Method::GET, "/v1/machines/vm1", 404),
        (Method::DELETE, "/v1/machines/vm1", 404),
        (Method::GET, "/v1/machines/vm1/balloon", 404),
        (Method::GET, "/v1/machines/vm1/dirty-rate", 405),
        (Method::GET, "/v1/machines/vm1/disk", 405),
        (Method::GET, "/v1/machines/..%2F..%2Fetc", 404),
        (Method::GET, "/v1/machines/%ff", 400),
        (Method::GET, "/v1/migrations/mig-1", 404),
        (Method::DELETE, "/v1/migrations/mig-1", 404),
        (Method::DELETE, "/v1/events/evt-1", 404),
        (Method::GET, "/v1/audit?limit=0", 400),
        (Method::GET, "/v1/audit?limit=x", 400),
        (Method::GET, "/v1/capacity?risk=0", 400),
        (Method::GET, "/v1/capacity?risk=nan", 400),
        (Method::GET, "/v1/capacity?limit=1", 400),
        (Method::GET, "/v1/audit?offset=1", 400),
        (Method::GET, "/v1/peer/summary", 404),
    ] {
        let problem = problem(&host, method.clone(), path, None).await;
        assert_eq!(problem.status, status, "{method} {path}: {problem:?}");
        assert!(!problem.detail.is_empty());
    }
}

#[tokio::test]
async fn malformed_bodies_say_what_is_wrong_with_them() {
    let (_folder, host) = host("[]").await;
    let cases: [(&str, Option<Vec<u8>>, u16, &str); 17] = [
        ("/v1/machines", None, 400, "EOF"),
        ("/v1/machines", Some(b"{\"name\": ".to_vec()), 400, "EOF"),
        ("/v1/machines", Some(b"\xff\xfe".to_vec()), 400, "expected value"),
        ("/v1/machines", Some(b"[]".to_vec()), 400, "invalid length"),
        ("/v1/machines", Some(b"{\"name\":\"vm1\"}".to_vec()), 400, "memory_mib"),
        ("/v1/machines", machine(|json| json["memory_mib"] = "many".into()), 400, "memory_mib"),
        ("/v1/machines", machine(|json| json["memory_mib"] = (-1).into()), 400, "u64"),
        ("/v1/machines", machine(|json| json["memory"] = 1.into()), 400, "unknown field `memory`"),
        ("/v1/machines", machine(|json| json["name"] = "../../etc/x".into()), 400, "letters, digits"),
        ("/v1/machines", machine(|json| json["memory_mib"] = 2000.into()), 507, "1000 of 1000 MiB are free"),
        (
            "/v1/machines",
            machine(|json| json["disks"] = json!([{"id": "d", "path": "/nonexistent/x"}])),
            422,
            "/nonexistent/x",
        ),
        ("/v1/machines/vm1/migrate", Some(b"{}".to_vec()), 400, "destination"),
        ("/v1/machines/vm1/detach", Some(b"{}".to_vec()), 400, "id"),
        ("/v1/machines/vm1/detach", Some(b"{\"id\": \"disk0\"}".to_vec()), 404, "machine list"),
        ("/v1/events", Some(b"{\"name\":\"x\"}".to_vec()), 400, "target"),
        ("/v1/events", event("FREQ=YEARLY"), 400, "repeats: FREQ=YEARLY is not supported: use FREQ"),
        ("/v1/events", event("FREQ=MINUTELY"), 400, "comes again after 60 s and lasts 90 s"),
    ];
    for (path, body, status, words) in cases {
        let problem = problem(&host, Method::POST, path, body.clone()).await;
        let body = body.map(|body| String::from_utf8_lossy(&body).into_owned());
        assert_eq!(problem.status, status, "{path} {body:?}: {problem:?}");
        assert!(problem.detail.contains(words), "{path} {body:?}: {problem:?}");
    }
    assert!(host.client.machines().await.unwrap().is_empty(), "nothing is left behind");
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_before_it_is_read() {
    let (_folder, host) = host("[]").await;
    let large = vec![b' '; (1 << 20) + 1];
    assert_eq!(problem(&host, Method::POST, "/v1/machines", Some(large)).await.status, 413);
    // Declared and never sent: the answer comes from the declaration alone.
    let answer = raw(&host, b"POST /v1/machines HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    // Not declared: chunks without end.
    let mut request = b"POST /v1/machines HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..20 {
        request.extend_from_slice(b"10000\r\n");
        request.extend_from_slice(&[b' '; 0x10000]);
        request.extend_from_slice(b"\r\n");
    }
    let answer = raw(&host, &request).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
}

#[tokio::test]
async fn garbage_on_the_socket_does_not_disturb_others() {
    let (_folder, host) = host("[]").await;
    for garbage in [&b"\x16\x03\x01\x02\x00"[..], b"GET\r\n\r\n", b"\0\0\0\0\r\n\r\n"] {
        let answer = raw(&host, garbage).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
    assert_eq!(host.client.host().await.unwrap().host, "a1");
}

/// What is answered to `bytes` until the other end closes, or has been silent for a moment.
async fn raw(host: &Host, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(host.client.socket()).await.unwrap();
    // The daemon may answer and close before it has read all: that is its right.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn a_machine_whose_vmm_cannot_start_leaves_nothing() {
    let (folder, host) = host("[]").await;
    let body = machine(|json| json["disks"] = json!([{"id": "d", "size_mib": 8}]));
    let problem = problem(&host, Method::POST, "/v1/machines", body).await;
    assert!(problem.detail.contains("/nonexistent/headroom-vmm"), "{problem:?}");
    assert!(host.client.machines().await.unwrap().is_empty());
    for left in ["run/machines/vm1", "state/machines/vm1"] {
        assert!(!folder.path().join("a1").join(left).exists(), "{left} is left behind");
    }
}

#[tokio::test]
async fn destinations_must_be_declared_peers() {
    let (_folder, host) = host("[]").await;
    for (destination, words) in [("a1", "is this host"), ("c1", "not a peer"), ("../b1", "not a peer")] {
        let request = json!({"destination": destination}).to_string().into_bytes();
        let problem = problem(&host, Method::POST, "/v1/machines/vm1/migrate", Some(request)).await;
        assert_eq!(problem.status, 400);
        assert!(problem.detail.contains(words), "{problem:?}");
    }
    let request = MigrateRequest { destination: "b1".into(), ..MigrateRequest::default() };
    let error = host.client.migrate("vm1", &request).await.unwrap_err();
    assert_eq!(error.status(), Some(404), "{error}");
}

#[tokio::test]
async fn what_a_rule_denies_is_denied_and_recorded() {
    let uid = nix::unistd::geteuid().as_raw();
    let rules = json!([{"who": {"uid": uid}, "may_not": ["create", "event"]}]).to_string();
    let (_folder, host) = host(&rules).await;
    let denied = problem(&host, Method::POST, "/v1/machines", machine(|_| ())).await;
    assert_eq!(denied.status, 403);
    assert!(denied.detail.contains("access[0]"), "{denied:?}");
    host.wait_denial(&format!("uid:{uid} create")).await;
    host.client.pools().await.unwrap();
    host.daemon.store.check_audit().unwrap();
}

/// As from a process of another user: the control socket itself would have to be reachable for one.
async fn as_user(host: &Host, uid: u32, path: &str, body: Vec<u8>) -> (u16, String) {
    let actor = Actor::User { uid, operator: true };
    let router = router(control::routes(), Arc::clone(&host.daemon)).layer(Extension(actor));
    let request = Request::post(path).header("content-type", "application/json").body(Body::from(body)).unwrap();
    let response = router.oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

/// A guest reads and writes what its machine was given, and the VMM opens it as root.
#[tokio::test]
async fn only_root_gives_any_file_of_the_host_to_a_machine() {
    let (_folder, host) = host("[]").await;
    let uid = nix::unistd::geteuid().as_raw().wrapping_add(1).max(1);
    let disks = json!([{"id": "d", "size_mib": 1}, {"id": "e", "path": "/etc/shadow", "read_only": true}]);
    let with = |field: &str, value: &Value| machine(|json| json[field] = value.clone()).unwrap();
    for (field, value) in [("kernel", &"/etc/shadow".into()), ("initrd", &"/etc/shadow".into()), ("disks", &disks)] {
        let (status, answer) = as_user(&host, uid, "/v1/machines", with(field, value)).await;
        assert_eq!(status, 403, "{answer}");
        assert!(answer.contains("/etc/shadow") && answer.contains("image_dirs"), "{answer}");
    }
    let disk = json!({"id": "d", "path": "/etc/shadow"}).to_string().into_bytes();
    let (status, answer) = as_user(&host, uid, "/v1/machines/vm1/attach", disk).await;
    assert!(status == 403 && answer.contains("image_dirs"), "{answer}");
    host.wait_denial(&format!("uid:{uid} create")).await;
    host.wait_denial(&format!("uid:{uid} adjust")).await;
    // Without files of the host it goes on, to the VMM that this host does not have.
    let (status, answer) = as_user(&host, uid, "/v1/machines", machine(|_| ()).unwrap()).await;
    assert!(status == 500 && answer.contains("vmm-missing"), "{answer}");
    let (status, answer) = as_user(&host, 0, "/v1/machines", with("disks", &disks)).await;
    assert!(status != 403, "{answer}");
}

#[tokio::test]
async fn events_are_kept_until_they_are_removed() {
    let (_folder, host) = host("[]").await;
    let new = json!({"name": "batch", "target": {"pool": "a"}, "starts_in_s": 60.0, "duration_s": 10.0,
        "adds": {"cpu_cores": 1.5}});
    let event = host.client.add_event(&serde_json::from_value(new).unwrap()).await.unwrap();
    assert_eq!(host.client.events().await.unwrap(), std::slice::from_ref(&event));
    host.client.remove_event(&event.id).await.unwrap();
    assert!(host.client.events().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_second_daemon_does_not_take_a_socket_in_use() {
    let (_folder, host) = host("[]").await;
    let error = hostd::api::serve::listen_unix(&host.daemon.config).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    host.client.host().await.unwrap();
}
