//! Who is let in between daemons, and what the others are told.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod common;

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use common::{Host, authority, declared};
use hostd::pool::{PeerClient, PeerError};
use hostd::security::pki;
use hostd::security::tls::Identity;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const REQUEST: &[u8] = b"GET /v1/peer/summary HTTP/1.1\r\nhost: a1\r\n\r\n";

async fn host(folder: &Path) -> Host {
    authority(folder);
    Host::start(folder, "a1", vec![declared("a2", "a"), declared("b1", "b")], Vec::new()).await
}

/// A client with the identity of `name` from the authority in `pki`.
fn peer(pki: &Path, name: &str, to: &str, address: SocketAddr) -> PeerClient {
    let paths = pki::issue(pki, name).unwrap();
    PeerClient::new(to, address, Identity::load(name, &paths).unwrap())
}

#[tokio::test]
async fn a_declared_peer_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path()).await;
    let summary = peer(&folder.path().join("pki"), "b1", "a1", host.address).summary().await.unwrap();
    assert_eq!((summary.host.host.as_str(), summary.pool.as_str()), ("a1", "a"));
    assert_eq!(host.denials().await, Vec::<String>::new());
}

#[tokio::test]
async fn an_undeclared_host_of_the_same_authority_is_not_heard() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path()).await;
    let error = peer(&folder.path().join("pki"), "c1", "a1", host.address).summary().await.unwrap_err();
    assert!(matches!(error, PeerError::Unreachable { .. }), "{error}");
    host.wait_denial("its certificate is for [\"c1\"]").await;
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused_on_both_sides() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let host = host(folder.path()).await;
    let foreign = authority(other.path());
    // The client trusts the server, and the server does not trust the client.
    let mut mixed = pki::issue(&foreign, "b1").unwrap();
    mixed.ca = folder.path().join("pki/ca.pem");
    let client = PeerClient::new("a1", host.address, Identity::load("b1", &mixed).unwrap());
    assert!(client.summary().await.is_err());
    host.wait_denial("TLS:").await;
    // The client does not trust the server.
    let client = peer(&foreign, "a2", "a1", host.address);
    let error = client.summary().await.unwrap_err();
    let error = hostd::machine::chain(&error);
    assert!(error.contains("invalid peer certificate"), "{error}");
}

#[tokio::test]
async fn a_server_with_another_hosts_name_is_not_talked_to() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path()).await;
    let client = peer(&folder.path().join("pki"), "b1", "a2", host.address);
    let error = hostd::machine::chain(&client.summary().await.unwrap_err());
    assert!(error.contains("not valid for name") || error.contains("NotValidForName"), "{error}");
}

#[tokio::test]
async fn without_a_certificate_not_one_byte_is_parsed() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path()).await;
    let mut roots = RootCertStore::empty();
    let ca = std::fs::read(folder.path().join("pki/ca.pem")).unwrap();
    roots.add(CertificateDer::from_pem_slice(&ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = TcpStream::connect(host.address).await.unwrap();
    // In TLS 1.3 the client is done before the server has looked for its certificate: the refusal comes with the first read.
    if let Ok(mut stream) = connector.connect(ServerName::try_from("a1").unwrap(), stream).await {
        let _ = stream.write_all(REQUEST).await;
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await.unwrap();
        assert!(read.is_err() && answer.is_empty(), "{:?}", String::from_utf8_lossy(&answer));
    }
    host.wait_denial("TLS:").await;
}

#[tokio::test]
async fn plain_text_and_silence_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path()).await;
    let mut plain = TcpStream::connect(host.address).await.unwrap();
    plain.write_all(REQUEST).await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!String::from_utf8_lossy(&answer).contains("HTTP"), "{answer:?}");
    host.wait_denial("TLS:").await;
    let silent = TcpStream::connect(host.address).await.unwrap();
    host.wait_denial("no handshake within 5 s").await;
    drop(silent);
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path()).await;
    let paths = pki::issue(&folder.path().join("pki"), "b1").unwrap();
    let openssl = |version: &str| {
        tokio::process::Command::new("openssl")
            .args(["s_client", version, "-connect", &host.address.to_string(), "-servername", "a1"])
            .arg("-CAfile")
            .arg(&paths.ca)
            .arg("-cert")
            .arg(&paths.certificate)
            .arg("-key")
            .arg(&paths.key)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .output()
    };
    let Ok(good) = openssl("-tls1_3").await else {
        println!("openssl is not installed: a TLS 1.2 client could not be tried");
        return;
    };
    let text = String::from_utf8_lossy(&good.stdout);
    assert!(text.contains("TLSv1.3"), "the control: TLS 1.3 works with this client: {text}");
    let old = openssl("-tls1_2").await.unwrap();
    let text = String::from_utf8_lossy(&old.stdout).into_owned() + &String::from_utf8_lossy(&old.stderr);
    assert!(!old.status.success() && !text.contains("Cipher is ECDHE"), "{text}");
    host.wait_denial("TLS:").await;
}

#[tokio::test]
async fn a_peer_may_not_do_what_the_rules_do_not_allow() {
    let folder = tempfile::tempdir().unwrap();
    authority(folder.path());
    let rules = serde_json::from_str(r#"[{"who":{"host":"b1"},"may":["view"]}]"#).unwrap();
    let host = Host::start(folder.path(), "a1", vec![declared("a2", "a"), declared("b1", "b")], rules).await;
    let pki = folder.path().join("pki");
    let b1 = peer(&pki, "b1", "a1", host.address);
    b1.summary().await.unwrap();
    let refused = b1.settle("mig-000000000001").await.unwrap_err();
    assert!(matches!(&refused, PeerError::Refused { problem, .. } if problem.status == 403), "{refused}");
    host.wait_denial("host:b1 settle").await;
    let a2 = peer(&pki, "a2", "a1", host.address);
    let refused = a2.summary().await.unwrap_err();
    assert!(matches!(&refused, PeerError::Refused { problem, .. } if problem.status == 403), "{refused}");
}

#[tokio::test]
async fn a_migration_that_never_came_is_settled_for_good() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path()).await;
    let pki = folder.path().join("pki");
    let b1 = peer(&pki, "b1", "a1", host.address);
    let never = hostd::pool::wire::Settlement::Never;
    assert_eq!(b1.settle("mig-00000000000a").await.unwrap(), never);
    assert_eq!(b1.settle("mig-00000000000a").await.unwrap(), never);
    // Another host learns nothing of it, and cannot use its id.
    let a2 = peer(&pki, "a2", "a1", host.address);
    let refused = a2.settle("mig-00000000000a").await.unwrap_err();
    assert!(matches!(&refused, PeerError::Refused { problem, .. } if problem.status == 404), "{refused}");
    let refused = b1.settle("../../etc").await.unwrap_err();
    assert!(matches!(refused, PeerError::Refused { .. }), "{refused}");
}
