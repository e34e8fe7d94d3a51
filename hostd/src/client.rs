//! Typed client of the control API, over its unix socket; one connection a request.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};
use vmm::api::{BalloonInfo, BalloonTarget};

use crate::api::types::{
    AuditRecord, ChangedLimits, CreateMachine, DetachDisk, DirtyRate, DirtyRateRequest, Disk, DiskSize, Drain,
    DrainRequest, Event, HostBandwidth, HostView, Machine, MachineForecast, MigrateRequest, Migration, NewDisk,
    NewEvent, Plan, PoolCapacity, PoolView, Problem, StopMachine,
};

/// Largest answer that is read, in bytes.
const ANSWER_MAX: usize = 64 << 20;

/// A request that was not answered as it should.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("cannot reach hostd at {}: is it running, and is this its `socket`? (--socket, or HEADROOM_SOCKET)", socket.display())]
    Connect {
        /// Socket.
        socket: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("hostd at {} did not answer {request}: its log says why", socket.display())]
    Http {
        /// Socket.
        socket: PathBuf,
        /// Method and path.
        request: String,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// hostd refused, and says why.
    #[error("{}", .0.detail)]
    Problem(Problem),
    /// The answer is not what this client understands.
    #[error("hostd answered {request} with something else than this version expects: update both to one version")]
    Decode {
        /// Method and path.
        request: String,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
    /// It took too long.
    #[error("{what} took longer than {seconds:.1} s")]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: f64,
    },
}

impl ClientError {
    /// HTTP status of a refusal.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Problem(problem) => Some(problem.status),
            _ => None,
        }
    }
}

type Result<T> = std::result::Result<T, ClientError>;

/// A client of one hostd.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the hostd whose control socket is at `socket`; connects with each request.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The socket that it talks to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// This host.
    pub async fn host(&self) -> Result<HostView> {
        self.get("/v1/host").await
    }

    /// All pools as seen from this host.
    pub async fn pools(&self) -> Result<Vec<PoolView>> {
        self.get("/v1/pools").await
    }

    /// Forecasts of the machines of this host's pool.
    pub async fn forecasts(&self) -> Result<Vec<MachineForecast>> {
        self.get("/v1/forecasts").await
    }

    /// How many hosts each pool needs over the next day; the configured risk if none is given.
    pub async fn capacity(&self, risk: Option<f64>) -> Result<Vec<PoolCapacity>> {
        let query = risk.map(|risk| format!("?risk={risk}")).unwrap_or_default();
        self.get(&format!("/v1/capacity{query}")).await
    }

    /// All machines of this host.
    pub async fn machines(&self) -> Result<Vec<Machine>> {
        self.get("/v1/machines").await
    }

    /// One machine.
    pub async fn machine(&self, name: &str) -> Result<Machine> {
        self.get(&format!("/v1/machines/{}", escape(name))).await
    }

    /// Creates and starts a machine; returns when its VMM runs.
    pub async fn create_machine(&self, machine: &CreateMachine) -> Result<Machine> {
        self.call(Method::POST, "/v1/machines", Some(machine)).await
    }

    /// Starts a stopped machine again.
    pub async fn start_machine(&self, name: &str) -> Result<Machine> {
        self.call(Method::POST, &format!("/v1/machines/{}/start", escape(name)), None::<&()>).await
    }

    /// What a machine has given back through its balloon.
    pub async fn balloon(&self, name: &str) -> Result<BalloonInfo> {
        self.call(Method::GET, &format!("/v1/machines/{}/balloon", escape(name)), None::<&()>).await
    }

    /// Asks a machine to give so many MiB back; 0 returns all of them to it.
    pub async fn inflate(&self, name: &str, target_mib: u64) -> Result<BalloonInfo> {
        let target = BalloonTarget { target_mib };
        self.call(Method::PUT, &format!("/v1/machines/{}/balloon", escape(name)), Some(&target)).await
    }

    /// Makes a disk of a machine larger.
    pub async fn resize_disk(&self, name: &str, size: &DiskSize) -> Result<Machine> {
        self.call(Method::PUT, &format!("/v1/machines/{}/disk", escape(name)), Some(size)).await
    }

    /// Stops a machine; takes as long as its guest, and no longer than is allowed.
    pub async fn stop_machine(&self, name: &str, how: &StopMachine) -> Result<Machine> {
        self.call(Method::POST, &format!("/v1/machines/{}/stop", escape(name)), Some(how)).await
    }

    /// Gives a stopped machine another disk.
    pub async fn attach_disk(&self, name: &str, disk: &NewDisk) -> Result<Machine> {
        self.call(Method::POST, &format!("/v1/machines/{}/attach", escape(name)), Some(disk)).await
    }

    /// Takes a disk from a stopped machine; its image stays.
    pub async fn detach_disk(&self, name: &str, id: &str) -> Result<Disk> {
        let which = DetachDisk { id: id.to_owned() };
        self.call(Method::POST, &format!("/v1/machines/{}/detach", escape(name)), Some(&which)).await
    }

    /// Estimates how fast a machine dirties its memory; takes the interval that is asked for.
    pub async fn dirty_rate(&self, name: &str, request: &DirtyRateRequest) -> Result<DirtyRate> {
        self.call(Method::POST, &format!("/v1/machines/{}/dirty-rate", escape(name)), Some(request)).await
    }

    /// Stops a machine and deletes what hostd made for it.
    pub async fn delete_machine(&self, name: &str) -> Result<()> {
        self.call_empty(Method::DELETE, &format!("/v1/machines/{}", escape(name))).await
    }

    /// Starts a migration; it goes on in the background.
    pub async fn migrate(&self, name: &str, request: &MigrateRequest) -> Result<Migration> {
        self.call(Method::POST, &format!("/v1/machines/{}/migrate", escape(name)), Some(request)).await
    }

    /// Migrations from and to this host, the newest first.
    pub async fn migrations(&self) -> Result<Vec<Migration>> {
        self.get("/v1/migrations").await
    }

    /// One migration.
    pub async fn migration(&self, id: &str) -> Result<Migration> {
        self.get(&format!("/v1/migrations/{}", escape(id))).await
    }

    /// Cancels a migration; it has ended once its stage says so.
    pub async fn cancel_migration(&self, id: &str) -> Result<Migration> {
        self.call(Method::DELETE, &format!("/v1/migrations/{}", escape(id)), None::<&()>).await
    }

    /// Gives up a post-copy whose link is lost.
    pub async fn abandon_migration(&self, id: &str) -> Result<Migration> {
        self.call(Method::POST, &format!("/v1/migrations/{}/abandon", escape(id)), None::<&()>).await
    }

    /// Runs a machine in doubt at its source again: its destination is gone for good.
    pub async fn take_back_migration(&self, id: &str) -> Result<Migration> {
        self.call(Method::POST, &format!("/v1/migrations/{}/take-back", escape(id)), None::<&()>).await
    }

    /// Lets a migration switch over that was held back.
    pub async fn continue_migration(&self, id: &str) -> Result<Migration> {
        self.call(Method::POST, &format!("/v1/migrations/{}/continue", escape(id)), None::<&()>).await
    }

    /// Changes limits of a migration while it runs.
    pub async fn change_limits(&self, id: &str, limits: &ChangedLimits) -> Result<Migration> {
        self.call(Method::PUT, &format!("/v1/migrations/{}/limits", escape(id)), Some(limits)).await
    }

    /// Changes the bandwidth that all migrations from this host share.
    pub async fn set_bandwidth(&self, bandwidth: &HostBandwidth) -> Result<HostBandwidth> {
        self.call(Method::PUT, "/v1/host/bandwidth", Some(bandwidth)).await
    }

    /// How far the drain of this host is.
    pub async fn drain(&self) -> Result<Drain> {
        self.get("/v1/host/drain").await
    }

    /// Closes this host and moves its machines away, or goes on with that.
    pub async fn start_drain(&self, request: &DrainRequest) -> Result<Drain> {
        self.call(Method::POST, "/v1/host/drain", Some(request)).await
    }

    /// Has no further machine moved; the host stays closed.
    pub async fn pause_drain(&self) -> Result<Drain> {
        self.call(Method::POST, "/v1/host/drain/pause", None::<&()>).await
    }

    /// Opens this host again.
    pub async fn end_drain(&self) -> Result<Drain> {
        self.call(Method::DELETE, "/v1/host/drain", None::<&()>).await
    }

    /// Scheduled events.
    pub async fn events(&self) -> Result<Vec<Event>> {
        self.get("/v1/events").await
    }

    /// Declares a scheduled event.
    pub async fn add_event(&self, event: &NewEvent) -> Result<Event> {
        self.call(Method::POST, "/v1/events", Some(event)).await
    }

    /// Removes a scheduled event.
    pub async fn remove_event(&self, id: &str) -> Result<()> {
        self.call_empty(Method::DELETE, &format!("/v1/events/{}", escape(id))).await
    }

    /// Decisions of the planner, the newest first.
    pub async fn plans(&self) -> Result<Vec<Plan>> {
        self.get("/v1/plans").await
    }

    /// The last `limit` records of the audit log, the oldest first.
    pub async fn audit(&self, limit: usize) -> Result<Vec<AuditRecord>> {
        self.get(&format!("/v1/audit?limit={limit}")).await
    }

    /// Waits until hostd answers.
    pub async fn wait_ready(&self, timeout: Duration) -> Result<HostView> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.host().await {
                Err(error @ (ClientError::Connect { .. } | ClientError::Http { .. })) if Instant::now() >= deadline => {
                    return Err(error);
                }
                Err(ClientError::Connect { .. } | ClientError::Http { .. }) => sleep(Duration::from_millis(20)).await,
                other => return other,
            }
        }
    }

    /// Waits until a migration has ended and returns it, calling `progress` with every answer on the way (ten a second).
    pub async fn wait_migration(
        &self,
        id: &str,
        timeout: Duration,
        mut progress: impl FnMut(&Migration),
    ) -> Result<Migration> {
        let started = Instant::now();
        loop {
            let migration = self.migration(id).await?;
            progress(&migration);
            if migration.stage.ended() {
                return Ok(migration);
            }
            if started.elapsed() > timeout {
                return Err(ClientError::Timeout {
                    what: format!("migration {id} of `{}` (stage {:?})", migration.machine, migration.stage),
                    seconds: timeout.as_secs_f64(),
                });
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::GET, path, None::<&()>).await
    }

    async fn call<B: Serialize, T: DeserializeOwned>(&self, method: Method, path: &str, body: Option<&B>) -> Result<T> {
        let request = format!("{method} {path}");
        let body = body.map(serde_json::to_vec).transpose();
        let body = body.map_err(|source| ClientError::Decode { request: request.clone(), source })?;
        let answer = self.exchange(method, path, body).await?;
        serde_json::from_slice(&answer).map_err(|source| ClientError::Decode { request, source })
    }

    async fn call_empty(&self, method: Method, path: &str) -> Result<()> {
        self.exchange(method, path, None).await.map(drop)
    }

    /// Sends one request with an already encoded body and returns the body of a successful answer.
    ///
    /// # Errors
    ///
    /// [`ClientError::Problem`] for every status outside 2xx.
    pub async fn exchange(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<Bytes> {
        let name = format!("{method} {path}");
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Connect { socket: self.socket.clone(), source })?;
        let http = |source: Box<dyn std::error::Error + Send + Sync>| ClientError::Http {
            socket: self.socket.clone(),
            request: name.clone(),
            source,
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| http(error.into()))?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header("host", "hostd");
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let request =
            request.body(Full::new(Bytes::from(body.unwrap_or_default()))).map_err(|error| http(error.into()))?;
        let answer = sender.send_request(request).await.map_err(|error| http(error.into()))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await.map_err(http)?.to_bytes();
        if status.is_success() { Ok(body) } else { Err(ClientError::Problem(problem(status, &body))) }
    }
}

/// The problem document of a refusal, made up from the status where there is none.
fn problem(status: StatusCode, body: &[u8]) -> Problem {
    serde_json::from_slice(body).unwrap_or_else(|_| Problem {
        kind: "about:blank".to_owned(),
        title: status.canonical_reason().unwrap_or("Error").to_owned(),
        status: status.as_u16(),
        detail: format!("hostd answered {status} without saying why"),
    })
}

/// Percent-encodes one path segment, so that a name never becomes another path.
fn escape(segment: &str) -> String {
    let mut escaped = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}
