//! The control API's requests about migrations.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Extension, Json};

use super::body::{Answer, Body, Segment};
use super::problem::Failure;
use super::subject::{about, object};
use super::types::{ChangedLimits, MigrateRequest, Migration};
use super::{Route, Shared, route};
use crate::security::access::{Action, Actor, Object};

type From = Extension<Actor>;

/// All of them.
pub(super) fn routes() -> Vec<Route> {
    vec![
        route(
            "POST",
            "/v1/machines/{name}/migrate",
            "Start to move a machine to another host",
            Some("MigrateRequest"),
            Some("Migration"),
            202,
            post(migrate),
        ),
        route(
            "GET",
            "/v1/migrations",
            "Migrations from and to this host, the newest first",
            None,
            Some("[Migration]"),
            200,
            get(all),
        ),
        route("GET", "/v1/migrations/{id}", "One migration", None, Some("Migration"), 200, get(one)),
        route("DELETE", "/v1/migrations/{id}", "Cancel a migration", None, Some("Migration"), 202, delete(cancel)),
        route(
            "PUT",
            "/v1/migrations/{id}/limits",
            "Change the bandwidth or the downtime limit of a migration while it runs",
            Some("ChangedLimits"),
            Some("Migration"),
            200,
            put(change_limits),
        ),
        route(
            "POST",
            "/v1/migrations/{id}/continue",
            "Let a migration switch over that was held back",
            None,
            Some("Migration"),
            202,
            post(proceed),
        ),
        route(
            "POST",
            "/v1/migrations/{id}/abandon",
            "Give up a post-copy whose link is lost: the machine is stopped for good",
            None,
            Some("Migration"),
            202,
            post(abandon),
        ),
        route(
            "POST",
            "/v1/migrations/{id}/take-back",
            "Run a machine in doubt here again: its destination is gone for good",
            None,
            Some("Migration"),
            202,
            post(take_back),
        ),
    ]
}

/// Whether `actor` may do this with the machine that migration `id` moves.
fn permit(daemon: &Shared, actor: &Actor, action: Action, id: &str) -> Result<(), Failure> {
    let machine = daemon.executor.get(id)?.machine;
    daemon.permit(actor, action, &object("migration", id), about(&machine))
}

fn accepted(migration: Migration) -> Response {
    (StatusCode::ACCEPTED, Json(migration)).into_response()
}

async fn migrate(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(name): Segment,
    Body(request): Body<MigrateRequest>,
) -> Result<Response, Failure> {
    let pool = daemon.config.peer(&request.destination).map(|peer| peer.pool.clone());
    let about = Object { machine: Some(&name), pool: pool.as_deref() };
    daemon.permit(&actor, Action::Migrate, &object("machine", &name), about)?;
    Ok(accepted(daemon.executor.start(&name, &request)?))
}

async fn all(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Vec<Migration>> {
    daemon.permit(&actor, Action::View, "migrations", Object::default())?;
    Ok(Json(daemon.executor.all()?))
}

async fn one(State(daemon): State<Shared>, Extension(actor): From, Segment(id): Segment) -> Answer<Migration> {
    daemon.permit(&actor, Action::View, &object("migration", &id), Object::default())?;
    Ok(Json(daemon.executor.get(&id)?))
}

async fn cancel(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(id): Segment,
) -> Result<Response, Failure> {
    permit(&daemon, &actor, Action::Cancel, &id)?;
    Ok(accepted(daemon.executor.cancel(&id)?))
}

async fn abandon(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(id): Segment,
) -> Result<Response, Failure> {
    // What is running of the machine ends, and what it had in memory is gone.
    permit(&daemon, &actor, Action::Delete, &id)?;
    Ok(accepted(daemon.executor.abandon(&id).await?))
}

async fn take_back(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(id): Segment,
) -> Result<Response, Failure> {
    // If the word is wrong the machine runs twice, which ruins it as surely as deleting it.
    permit(&daemon, &actor, Action::Delete, &id)?;
    Ok(accepted(daemon.executor.take_back(&id).await?))
}

async fn proceed(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(id): Segment,
) -> Result<Response, Failure> {
    permit(&daemon, &actor, Action::Migrate, &id)?;
    Ok(accepted(daemon.executor.proceed(&id).await?))
}

async fn change_limits(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(id): Segment,
    Body(limits): Body<ChangedLimits>,
) -> Answer<Migration> {
    permit(&daemon, &actor, Action::Migrate, &id)?;
    Ok(Json(daemon.executor.change_limits(&id, &limits).await?))
}
