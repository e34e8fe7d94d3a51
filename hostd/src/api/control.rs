//! The control API, for operators.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Extension, Json};

use super::body::{Answer, Body, Limit, Risk, Segment};
use super::problem::Failure;
use super::subject::object;
use super::types::{AuditRecord, Event, MachineForecast, NewEvent, Plan, PoolCapacity, PoolView};
use super::{Route, Shared, host, machines, migration, route};
use crate::security::access::{Action, Actor, Object};

type From = Extension<Actor>;

/// All routes. Several methods of one path are several routes here.
pub fn routes() -> Vec<Route> {
    let own = vec![
        route("GET", "/v1/pools", "All pools as seen from this host", None, Some("[PoolView]"), 200, get(pools)),
        route(
            "GET",
            "/v1/forecasts",
            "Forecasts of the machines of this host's pool",
            None,
            Some("[MachineForecast]"),
            200,
            get(forecasts),
        ),
        route(
            "GET",
            "/v1/capacity",
            "Hosts that each pool needs over the next day (?risk=R, the accepted probability that it runs out)",
            None,
            Some("[PoolCapacity]"),
            200,
            get(capacity),
        ),
        route("GET", "/v1/events", "Scheduled events", None, Some("[Event]"), 200, get(events)),
        route("POST", "/v1/events", "Declare an event", Some("NewEvent"), Some("Event"), 201, post(add_event)),
        route("DELETE", "/v1/events/{id}", "Remove an event", None, None, 204, delete(remove_event)),
        route("GET", "/v1/plans", "Decisions of the planner, the newest first", None, Some("[Plan]"), 200, get(plans)),
        route(
            "GET",
            "/v1/audit",
            "The last records of the audit log (?limit=N), the oldest first",
            None,
            Some("[AuditRecord]"),
            200,
            get(audit),
        ),
    ];
    host::routes().into_iter().chain(machines::routes()).chain(own).chain(migration::routes()).collect()
}

async fn pools(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Vec<PoolView>> {
    daemon.permit(&actor, Action::View, "pools", Object::default())?;
    Ok(Json(daemon.pool_views()))
}

async fn forecasts(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Vec<MachineForecast>> {
    daemon.permit(&actor, Action::View, "forecasts", Object::default())?;
    Ok(Json(daemon.planner().machine_forecasts()))
}

async fn capacity(State(daemon): State<Shared>, Extension(actor): From, Risk(risk): Risk) -> Answer<Vec<PoolCapacity>> {
    daemon.permit(&actor, Action::View, "capacity", Object::default())?;
    Ok(Json(daemon.planner().capacities(risk)))
}

async fn events(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Vec<Event>> {
    daemon.permit(&actor, Action::View, "events", Object::default())?;
    Ok(Json(daemon.all_events()))
}

async fn add_event(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Body(new): Body<NewEvent>,
) -> Result<Response, Failure> {
    daemon.permit(&actor, Action::Event, &format!("event:{}", new.name.escape_debug()), Object::default())?;
    Ok((StatusCode::CREATED, Json(daemon.add_event(new)?)).into_response())
}

async fn remove_event(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Segment(id): Segment,
) -> Result<StatusCode, Failure> {
    daemon.permit(&actor, Action::Event, &object("event", &id), Object::default())?;
    daemon.remove_event(&id)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn plans(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Vec<Plan>> {
    daemon.permit(&actor, Action::View, "plans", Object::default())?;
    Ok(Json(daemon.plans()?))
}

async fn audit(State(daemon): State<Shared>, Extension(actor): From, Limit(limit): Limit) -> Answer<Vec<AuditRecord>> {
    daemon.permit(&actor, Action::Audit, "audit", Object::default())?;
    Ok(Json(daemon.store.audit(limit)?))
}
