//! Connections: who is at the other end, and HTTP on it.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::Shared;
use crate::config::HostConfig;
use crate::flag::stopped;
use crate::security::access::{Actor, Who};
use crate::security::tls::host_names;

/// Connections that are served at the same time, on each of the two listeners.
const CONNECTIONS_MAX: usize = 256;

/// For a TLS handshake.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(5);

/// For the head of a request.
const HEAD_PATIENCE: Duration = Duration::from_secs(30);

/// Listens on the control socket. One that an earlier hostd left behind is replaced, one that is in use is not.
///
/// # Errors
///
/// If it is in use, or cannot be made.
pub fn listen_unix(config: &HostConfig) -> io::Result<UnixListener> {
    let path = &config.socket;
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        let message = format!("{} is in use: another hostd runs with this `socket`", path.display());
        return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    set_owner(config, path)?;
    Ok(listener)
}

/// The socket's mode keeps out those whom no rule could let in; who is let in is decided by uid for each request.
fn set_owner(config: &HostConfig, path: &Path) -> io::Result<()> {
    let mut mode = 0o600;
    if let Some(name) = &config.socket_group {
        let group = nix::unistd::Group::from_name(name)?;
        let group = group
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("socket_group `{name}` does not exist")))?;
        std::os::unix::fs::chown(path, None, Some(group.gid.as_raw()))?;
        mode = 0o660;
    }
    if config.access.iter().any(|rule| matches!(rule.who, Who::Uid(_))) {
        mode = 0o666;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

/// Serves operators until told to stop.
pub async fn serve_unix(listener: UnixListener, router: Router, daemon: Shared, mut stop: watch::Receiver<bool>) {
    let places = Places::default();
    while let Some((place, (stream, _))) = places.next(|| listener.accept(), &mut stop).await {
        let Ok(actor) = user(&stream, &daemon.config) else { continue };
        let (router, stop) = (router.clone(), stop.clone());
        tokio::spawn(async move {
            serve_connection(stream, router, actor, stop).await;
            drop(place);
        });
    }
}

/// Serves peers until told to stop.
pub async fn serve_peers(listener: TcpListener, router: Router, daemon: Shared, mut stop: watch::Receiver<bool>) {
    let places = Places::default();
    while let Some((place, (stream, from))) = places.next(|| listener.accept(), &mut stop).await {
        let (router, daemon, stop) = (router.clone(), Shared::clone(&daemon), stop.clone());
        tokio::spawn(async move {
            serve_peer(stream, from, router, &daemon, stop).await;
            drop(place);
        });
    }
}

/// Room for connections to one listener.
struct Places(Arc<Semaphore>);

impl Default for Places {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(CONNECTIONS_MAX)))
    }
}

impl Places {
    /// The next connection, once there is room for it; `None` when it is time to stop.
    async fn next<C, F: Future<Output = io::Result<C>>>(
        &self,
        mut accept: impl FnMut() -> F,
        stop: &mut watch::Receiver<bool>,
    ) -> Option<(OwnedSemaphorePermit, C)> {
        let place = Arc::clone(&self.0).acquire_owned().await.ok()?;
        loop {
            let accepted = tokio::select! {
                accepted = accept() => accepted,
                () = stopped(stop) => return None,
            };
            if let Some(connection) = accepted_or_wait(accepted).await {
                return Some((place, connection));
            }
        }
    }
}

/// Out of descriptors or memory: waiting a moment gives others the chance to end, spinning does not.
async fn accepted_or_wait<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            tracing::warn!(%error, "a connection could not be accepted");
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

async fn serve_peer(stream: TcpStream, from: SocketAddr, router: Router, daemon: &Shared, stop: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    let handshake = tokio::time::timeout(HANDSHAKE_PATIENCE, daemon.identity.acceptor().accept(stream)).await;
    let stream = match handshake {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return daemon.audit.refused(&from.ip().to_string(), &format!("TLS: {error}")),
        Err(_) => return daemon.audit.refused(&from.ip().to_string(), "TLS: no handshake within 5 s"),
    };
    let names = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(host_names).unwrap_or_default();
    let mut declared = daemon.config.peers.iter().filter(|peer| names.contains(&peer.host));
    // A certificate with the names of two peers would let its holder choose who he is.
    let (Some(peer), None) = (declared.next(), declared.next()) else {
        let detail = format!("its certificate is for {names:?}, and that is not exactly one of `peers`");
        return daemon.audit.refused(&from.ip().to_string(), &detail);
    };
    let actor = Actor::Peer { host: peer.host.clone(), pool: peer.pool.clone() };
    serve_connection(stream, router, actor, stop).await;
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    actor: Actor,
    mut stop: watch::Receiver<bool>,
) {
    let service = TowerToHyperService::new(router.layer(Extension(actor)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut stop) => {
            // The request that is being answered is answered.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

fn user(stream: &UnixStream, config: &HostConfig) -> io::Result<Actor> {
    let credentials = stream.peer_cred()?;
    let uid = credentials.uid();
    let own = nix::unistd::geteuid().as_raw();
    let operator = uid == 0 || uid == own || in_group(uid, credentials.gid(), config.socket_group.as_deref());
    Ok(Actor::User { uid, operator })
}

/// Whether a user belongs to `group`: by its process's group, or by the list of the group's members.
fn in_group(uid: u32, gid: u32, group: Option<&str>) -> bool {
    let Some(group) = group.and_then(|name| nix::unistd::Group::from_name(name).ok().flatten()) else { return false };
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten();
    group.gid.as_raw() == gid || user.is_some_and(|user| group.mem.contains(&user.name) || user.gid == group.gid)
}
