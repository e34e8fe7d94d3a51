//! A real daemon in this process: its API on a unix socket and on mutual TLS, without machines.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hostd::api::{control, peer, router, serve};
use hostd::client::Client;
use hostd::config::{CapacityConfig, HostConfig, PeerConfig, PlannerConfig, TlsPaths};
use hostd::daemon::Daemon;
use hostd::security::access::AccessRule;
use hostd::security::pki;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// One daemon.
pub struct Host {
    pub daemon: Arc<Daemon>,
    pub address: SocketAddr,
    pub client: Client,
    _stop: watch::Sender<bool>,
}

/// An authority in `folder/pki`.
pub fn authority(folder: &Path) -> PathBuf {
    let pki = folder.join("pki");
    pki::create_authority(&pki, "test").expect("a new authority");
    pki
}

/// A peer that is declared, at an address that need not answer.
pub fn declared(host: &str, pool: &str) -> PeerConfig {
    let last = host.bytes().next_back().unwrap_or_default();
    PeerConfig {
        host: host.into(),
        pool: pool.into(),
        address: SocketAddr::from(([127, 0, host.as_bytes()[0], last], 9)),
    }
}

/// A configuration for `host` with everything in `folder`.
pub fn config(folder: &Path, host: &str, tls: TlsPaths, peers: Vec<PeerConfig>) -> HostConfig {
    let own = folder.join(host);
    HostConfig {
        host: host.into(),
        pool: "a".into(),
        run_dir: own.join("run"),
        state_dir: own.join("state"),
        shared_dirs: Vec::new(),
        image_dirs: Vec::new(),
        socket: own.join("run/hostd.sock"),
        socket_group: None,
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        migration_address: [127, 0, 0, 1].into(),
        tls,
        vmm: Some("/nonexistent/headroom-vmm".into()),
        capacity: CapacityConfig { cpu_cores: Some(2.0), memory_mib: Some(1000.0), ..CapacityConfig::default() },
        peers,
        bridge: None,
        sample_interval_ms: 1000,
        planner: PlannerConfig::default(),
        concurrent_migrations: 2,
        migration: Default::default(),
        access: Vec::new(),
    }
}

impl Host {
    /// Starts `host` of pool `a`, with a certificate of the authority in `folder/pki`.
    pub async fn start(folder: &Path, host: &str, peers: Vec<PeerConfig>, access: Vec<AccessRule>) -> Self {
        let tls = pki::issue(&folder.join("pki"), host).expect("a certificate");
        let config = HostConfig { access, ..config(folder, host, tls, peers) };
        assert!(config.mistakes().iter().all(|mistake| mistake.field == "listen"), "{:?}", config.mistakes());
        let daemon = Arc::new(Daemon::new(config).expect("a daemon"));
        let peers = TcpListener::bind(daemon.config.listen).await.expect("a port");
        let address = peers.local_addr().expect("an address");
        let control = serve::listen_unix(&daemon.config).expect("a socket");
        let (stop, stopped) = watch::channel(false);
        let (operators, hosts) =
            (router(control::routes(), Arc::clone(&daemon)), router(peer::routes(), Arc::clone(&daemon)));
        tokio::spawn(serve::serve_unix(control, operators, Arc::clone(&daemon), stopped.clone()));
        tokio::spawn(serve::serve_peers(peers, hosts, Arc::clone(&daemon), stopped));
        let client = Client::new(&daemon.config.socket);
        Self { daemon, address, client, _stop: stop }
    }

    /// Details of what was denied so far.
    pub async fn denials(&self) -> Vec<String> {
        let records = self.client.audit(1000).await.expect("the audit log");
        let denied = records.into_iter().filter(|record| record.decision == hostd::api::types::Decision::Denied);
        denied.map(|record| format!("{} {} {}", record.actor, record.action, record.detail)).collect()
    }

    /// Waits until something was denied whose record contains `words`.
    pub async fn wait_denial(&self, words: &str) {
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            let denials = self.denials().await;
            if denials.iter().any(|denial| denial.contains(words)) {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "no denial with `{words}` in {denials:?}");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}
