//! Requests to one peer.

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::wire::{MigrateOrder, PeerSummary, Reservation, ReserveRequest, Settlement, Verified};
use crate::api::types::{Migration, Problem};
use crate::security::tls::{Identity, server_name};

/// Largest answer that is read.
const ANSWER_MAX: usize = 8 << 20;

/// For connecting and the handshake.
const CONNECT_PATIENCE: Duration = Duration::from_secs(3);

/// For an answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// For an answer after the peer has started a VMM, ended one, or asked probes.
const LONG_PATIENCE: Duration = Duration::from_secs(60);

/// A request that a peer did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// There was no connection, or it broke. Whether the request arrived is not known.
    #[error("cannot reach host `{host}` at {address}")]
    Unreachable {
        /// Peer.
        host: String,
        /// Its address.
        address: SocketAddr,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It took too long. Whether the request arrived is not known.
    #[error("host `{host}` at {address} did not answer within {} s", patience.as_secs())]
    Silent {
        /// Peer.
        host: String,
        /// Its address.
        address: SocketAddr,
        /// For how long it was waited.
        patience: Duration,
    },
    /// The peer refused, and says why.
    #[error("host `{host}` refused: {}", problem.detail)]
    Refused {
        /// Peer.
        host: String,
        /// Why.
        problem: Problem,
    },
    /// The answer cannot be understood.
    #[error("host `{host}` answered with something else than this version expects: update both to one version")]
    Decode {
        /// Peer.
        host: String,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
}

type Result<T> = std::result::Result<T, PeerError>;
type Cause = Box<dyn std::error::Error + Send + Sync>;
type Connection = SendRequest<Full<Bytes>>;

/// Requests to one peer. Summaries share one connection that is kept open; every other request has its own.
#[derive(Debug)]
pub struct PeerClient {
    host: String,
    address: SocketAddr,
    identity: Identity,
    kept: Mutex<Option<Connection>>,
}

impl PeerClient {
    /// A client of `host`, whose certificate must carry that name.
    pub fn new(host: &str, address: SocketAddr, identity: Identity) -> Self {
        Self { host: host.to_owned(), address, identity, kept: Mutex::new(None) }
    }

    /// What it tells of itself.
    ///
    /// # Errors
    ///
    /// If it does not answer, or not as expected; so with all requests.
    pub async fn summary(&self) -> Result<PeerSummary> {
        let mut kept = self.kept.lock().await;
        let reused = kept.take().filter(|connection| !connection.is_closed());
        let was_reused = reused.is_some();
        let mut connection = match reused {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        let path = "/v1/peer/summary";
        let mut answer = self.exchange(&mut connection, Method::GET, path, None, ANSWER_PATIENCE).await;
        if was_reused && matches!(answer, Err(PeerError::Unreachable { .. })) {
            // The peer may have closed it just now, between two requests: reading twice does no harm.
            connection = self.connect().await?;
            answer = self.exchange(&mut connection, Method::GET, path, None, ANSWER_PATIENCE).await;
        }
        if answer.is_ok() {
            *kept = Some(connection);
        }
        self.decode(&answer?)
    }

    /// Asks it to make ready for a machine.
    pub async fn reserve(&self, request: &ReserveRequest) -> Result<Reservation> {
        self.call(Method::POST, "/v1/peer/migrations", Some(request), LONG_PATIENCE).await
    }

    /// Its part of a migration.
    pub async fn migration(&self, id: &str) -> Result<Migration> {
        self.call(Method::GET, &format!("/v1/peer/migrations/{id}"), None::<&()>, ANSWER_PATIENCE).await
    }

    /// Has it decide where a machine runs; also gives back a reservation that is not needed any more.
    pub async fn settle(&self, id: &str) -> Result<Settlement> {
        self.call(Method::POST, &format!("/v1/peer/migrations/{id}/settle"), None::<&()>, LONG_PATIENCE).await
    }

    /// Has it ask the declared probes.
    pub async fn verify(&self, id: &str) -> Result<Verified> {
        self.call(Method::POST, &format!("/v1/peer/migrations/{id}/verify"), None::<&()>, LONG_PATIENCE).await
    }

    /// Has it move one of its machines.
    pub async fn migrate(&self, order: &MigrateOrder) -> Result<Migration> {
        self.call(Method::POST, "/v1/peer/migrate", Some(order), ANSWER_PATIENCE).await
    }

    async fn call<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
        patience: Duration,
    ) -> Result<T> {
        let body = body.map(serde_json::to_vec).transpose();
        let body = body.map_err(|source| PeerError::Decode { host: self.host.clone(), source })?;
        let mut connection = self.connect().await?;
        let answer = self.exchange(&mut connection, method, path, body, patience).await?;
        self.decode(&answer)
    }

    fn decode<T: DeserializeOwned>(&self, answer: &[u8]) -> Result<T> {
        serde_json::from_slice(answer).map_err(|source| PeerError::Decode { host: self.host.clone(), source })
    }

    async fn connect(&self) -> Result<Connection> {
        let connect = async {
            let stream = TcpStream::connect(self.address).await?;
            stream.set_nodelay(true)?;
            let stream = self.identity.connector().connect(server_name(&self.host)?, stream).await?;
            let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(std::io::Error::other)?;
            tokio::spawn(connection);
            Ok::<_, std::io::Error>(sender)
        };
        match timeout(CONNECT_PATIENCE, connect).await {
            Ok(connected) => connected.map_err(|error| self.unreachable(error.into())),
            Err(_) => Err(self.silent(CONNECT_PATIENCE)),
        }
    }

    async fn exchange(
        &self,
        connection: &mut Connection,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        patience: Duration,
    ) -> Result<Bytes> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.host)
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|error| self.unreachable(error.into()))?;
        let exchange = async {
            let answer = connection.send_request(request).await.map_err(|error| self.unreachable(error.into()))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
            Ok((status, body.map_err(|error| self.unreachable(error))?.to_bytes()))
        };
        let (status, body) = timeout(patience, exchange).await.map_err(|_| self.silent(patience))??;
        if status.is_success() {
            return Ok(body);
        }
        let problem = serde_json::from_slice(&body).unwrap_or_else(|_| Problem {
            kind: "about:blank".to_owned(),
            title: status.canonical_reason().unwrap_or("Error").to_owned(),
            status: status.as_u16(),
            detail: format!("status {status} without a reason"),
        });
        Err(PeerError::Refused { host: self.host.clone(), problem })
    }

    fn unreachable(&self, source: Cause) -> PeerError {
        PeerError::Unreachable { host: self.host.clone(), address: self.address, source }
    }

    fn silent(&self, patience: Duration) -> PeerError {
        PeerError::Silent { host: self.host.clone(), address: self.address, patience }
    }
}
