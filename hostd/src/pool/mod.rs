//! Peers: what they tell of themselves, and who plans for a pool.
//!
//! Every host asks each of its peers for a summary once an interval, over mutual TLS. A pool's leader is the live member
//! with the lowest name, by the view of whoever asks. Two members that do not see each other may both lead for a while; a
//! machine's own host decides about its migration and starts one at a time, so two plans cannot move one machine twice.

pub mod client;
pub mod wire;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use client::{PeerClient, PeerError};
use wire::PeerSummary;

use crate::api::types::{Event, HostSummary, PeerView, PoolView};
use crate::clock::unix_ms;
use crate::config::{HostConfig, PeerConfig};
use crate::security::tls::Identity;

/// One peer.
#[derive(Debug)]
pub struct Peer {
    config: PeerConfig,
    client: PeerClient,
    seen: Mutex<Seen>,
}

/// What was last heard of a peer.
#[derive(Debug, Default)]
struct Seen {
    at: Option<(Instant, u64)>,
    summary: Option<PeerSummary>,
    error: Option<String>,
}

/// All configured peers.
#[derive(Clone, Debug)]
pub struct Peers {
    own_host: String,
    own_pool: String,
    patience: Duration,
    peers: Arc<BTreeMap<String, Peer>>,
}

impl Peers {
    /// The peers of a configuration; none of them was heard of yet.
    pub fn new(config: &HostConfig, identity: &Identity) -> Self {
        let peer = |peer: &PeerConfig| {
            let client = PeerClient::new(&peer.host, peer.address, identity.clone());
            (peer.host.clone(), Peer { config: peer.clone(), client, seen: Mutex::default() })
        };
        Self {
            own_host: config.host.clone(),
            own_pool: config.pool.clone(),
            // Three lost answers, and never less than a busy host may need for one.
            patience: Duration::from_millis(config.sample_interval_ms * 3).max(Duration::from_secs(3)),
            peers: Arc::new(config.peers.iter().map(peer).collect()),
        }
    }

    /// The peer of that name.
    pub fn get(&self, host: &str) -> Option<&Peer> {
        self.peers.get(host)
    }

    /// Asks all peers for their summaries, at the same time.
    pub async fn exchange(&self) {
        let mut tasks = Vec::new();
        for host in self.peers.keys() {
            let (host, peers) = (host.clone(), Arc::clone(&self.peers));
            tasks.push(tokio::spawn(async move {
                if let Some(peer) = peers.get(&host) {
                    peer.refresh().await;
                }
            }));
        }
        for task in tasks {
            let _ = task.await;
        }
    }

    /// All peers as seen from here.
    pub fn views(&self) -> Vec<PeerView> {
        self.peers.values().map(|peer| peer.view(self.patience)).collect()
    }

    /// Summaries of all peers in `pool`; one that is not live says so.
    pub fn summaries(&self, pool: &str) -> Vec<HostSummary> {
        self.peers
            .values()
            .filter(|peer| peer.config.pool == pool)
            .filter_map(|peer| peer.host(self.patience))
            .collect()
    }

    /// Names of all pools, this host's first.
    pub fn pools(&self) -> Vec<String> {
        let mut pools = vec![self.own_pool.clone()];
        for peer in self.peers.values() {
            if !pools.contains(&peer.config.pool) {
                pools.push(peer.config.pool.clone());
            }
        }
        pools[1..].sort();
        pools
    }

    /// The leader of a pool: the live member with the lowest name.
    pub fn leader(&self, pool: &str) -> Option<String> {
        let live = self.peers.values().filter(|peer| peer.config.pool == pool && peer.live(self.patience));
        let names = live.map(|peer| peer.config.host.clone());
        let own = (pool == self.own_pool).then(|| self.own_host.clone());
        names.chain(own).min()
    }

    /// What the leader of another pool says of its pool.
    pub fn pool_view(&self, pool: &str) -> Option<PoolView> {
        let leader = self.leader(pool)?;
        let peer = self.peers.get(&leader)?;
        let seen = peer.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.summary.as_ref().and_then(|summary| summary.pool_view.clone())
    }

    /// Events that were declared on live peers.
    pub fn events(&self) -> Vec<Event> {
        let live = self.peers.values().filter(|peer| peer.live(self.patience));
        live.flat_map(|peer| {
            let seen = peer.seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.summary.as_ref().map(|summary| summary.events.clone()).unwrap_or_default()
        })
        .collect()
    }
}

impl Peer {
    /// Requests to it.
    pub fn client(&self) -> &PeerClient {
        &self.client
    }

    /// Its configuration.
    pub fn config(&self) -> &PeerConfig {
        &self.config
    }

    async fn refresh(&self) {
        let answer = self.client.summary().await;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match answer {
            // A peer that calls itself otherwise than its certificate is misconfigured: nothing it says counts.
            Ok(summary) if summary.host.host == self.config.host && summary.pool == self.config.pool => {
                if seen.error.take().is_some() || seen.at.is_none() {
                    tracing::info!(peer = self.config.host, "peer answers");
                }
                *seen = Seen { at: Some((Instant::now(), unix_ms())), summary: Some(summary), error: None };
            }
            Ok(summary) => {
                seen.error = Some(format!(
                    "it calls itself `{}` of pool `{}`: correct `peers` here, or `host` and `pool` there",
                    summary.host.host, summary.pool
                ));
            }
            Err(error) => {
                let error = crate::machine::chain(&error);
                if seen.error.as_ref() != Some(&error) {
                    tracing::warn!(peer = self.config.host, error, "peer does not answer");
                }
                seen.error = Some(error);
            }
        }
    }

    fn live(&self, patience: Duration) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.at.is_some_and(|(at, _)| at.elapsed() <= patience)
    }

    fn view(&self, patience: Duration) -> PeerView {
        let live = self.live(patience);
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        PeerView {
            host: self.config.host.clone(),
            pool: self.config.pool.clone(),
            address: self.config.address.to_string(),
            live,
            last_seen_unix_ms: seen.at.map(|(_, at)| at),
            error: seen.error.clone(),
        }
    }

    fn host(&self, patience: Duration) -> Option<HostSummary> {
        let live = self.live(patience);
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.summary.as_ref().map(|summary| HostSummary { live, ..summary.host.clone() })
    }
}
