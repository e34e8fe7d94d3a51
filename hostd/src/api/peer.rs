//! The API between daemons; see [`crate::pool::wire`]. Who asks is known from the certificate.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json};

use super::body::{Answer, Body, Segment};
use super::problem::Failure;
use super::subject::object;
use super::types::{MigrateRequest, Migration, OnFailedProbe};
use super::{Route, Shared};
use crate::pool::wire::{MigrateOrder, PeerSummary, Reservation, ReserveRequest, Settlement, Verified};
use crate::security::access::{Action, Actor, Object};

type From = Extension<Actor>;

/// All routes.
pub fn routes() -> Vec<Route> {
    let route = |method, path, summary, handler| Route {
        method,
        path,
        summary,
        request: None,
        response: None,
        status: 200,
        handler,
    };
    vec![
        route("GET", "/v1/peer/summary", "What this host tells of itself", get(summary)),
        route("POST", "/v1/peer/migrations", "Make ready for a machine", post(reserve)),
        route("GET", "/v1/peer/migrations/{id}", "This host's part of a migration", get(migration)),
        route("POST", "/v1/peer/migrations/{id}/settle", "Where does it run?", post(settle)),
        route("POST", "/v1/peer/migrations/{id}/verify", "Ask the declared probes", post(verify)),
        route("POST", "/v1/peer/migrate", "Move a machine of this host", post(migrate)),
    ]
}

/// The peer's name and pool; everything here is for peers only.
fn peer(actor: &Actor) -> Result<(&str, &str), Failure> {
    match actor {
        Actor::Peer { host, pool } => Ok((host, pool)),
        Actor::User { .. } | Actor::Planner => Err(Failure::new(403, "denied", "this is for hosts only")),
    }
}

async fn summary(State(daemon): State<Shared>, Extension(actor): From) -> Answer<PeerSummary> {
    daemon.permit(&actor, Action::View, "summary", Object::default())?;
    Ok(Json(daemon.summary()))
}

async fn reserve(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Body(request): Body<ReserveRequest>,
) -> Answer<Reservation> {
    let (host, pool) = peer(&actor)?;
    let what = object("machine", &request.machine.name);
    let about = Object { machine: Some(&request.machine.name), pool: Some(pool) };
    daemon.permit(&actor, Action::Receive, &what, about)?;
    if request.on_failed_probe == OnFailedProbe::Return {
        // The machine would be moved away from here at the source's wish.
        daemon.permit(&actor, Action::Migrate, &what, about)?;
    }
    let (host, executor) = (host.to_owned(), daemon.executor.clone());
    // In a task of its own: a source that hangs up does not leave half a machine.
    let work = tokio::spawn(async move { executor.reserve(&host, request).await });
    let done = work.await.map_err(|error| Failure::new(500, "internal", error.to_string()))?;
    if let Err(error) = &done {
        daemon.audit.noted("refused", &what, &crate::machine::chain(error));
    }
    Ok(Json(done?))
}

async fn migration(State(daemon): State<Shared>, Extension(actor): From, Segment(id): Segment) -> Answer<Migration> {
    daemon.permit(&actor, Action::View, "migration", Object::default())?;
    Ok(Json(daemon.executor.get(&id)?))
}

async fn settle(State(daemon): State<Shared>, Extension(actor): From, Segment(id): Segment) -> Answer<Settlement> {
    let (host, pool) = peer(&actor)?;
    let about = Object { machine: None, pool: Some(pool) };
    daemon.permit(&actor, Action::Settle, &object("migration", &id), about)?;
    Ok(Json(daemon.executor.settle_destination(host, &id).await?))
}

async fn verify(State(daemon): State<Shared>, Extension(actor): From, Segment(id): Segment) -> Answer<Verified> {
    let (host, pool) = peer(&actor)?;
    let about = Object { machine: None, pool: Some(pool) };
    daemon.permit(&actor, Action::Settle, &object("migration", &id), about)?;
    Ok(Json(daemon.executor.verify(host, &id).await?))
}

async fn migrate(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Body(order): Body<MigrateOrder>,
) -> Result<Response, Failure> {
    let (host, pool) = peer(&actor)?;
    // Only the planner of this host's own pool moves its machines, whatever else the rules allow it.
    if pool != daemon.config.pool {
        let detail =
            format!("host `{host}` is of pool `{pool}`, and only hosts of pool `{}` plan for it", daemon.config.pool);
        daemon.audit.noted("refused", &object("machine", &order.machine), &detail);
        return Err(Failure::new(403, "denied", detail));
    }
    let to_pool = daemon.config.peer(&order.destination).map(|peer| peer.pool.clone());
    let about = Object { machine: Some(&order.machine), pool: to_pool.as_deref() };
    daemon.permit(&actor, Action::Migrate, &object("machine", &order.machine), about)?;
    let request = MigrateRequest {
        destination: order.destination,
        limits: order.limits,
        trigger: order.trigger,
        ..MigrateRequest::default()
    };
    let migration = daemon.executor.start(&order.machine, &request)?;
    Ok((StatusCode::ACCEPTED, Json(migration)).into_response())
}
