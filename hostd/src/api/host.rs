//! The control API's requests about this host as a whole.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Extension, Json};

use super::body::{Answer, Body};
use super::problem::Failure;
use super::types::{Drain, DrainRequest, HostBandwidth, HostView};
use super::{Route, Shared, route};
use crate::machine::{MachineError, spec};
use crate::security::access::{Action, Actor, Object};

type From = Extension<Actor>;

/// All of them.
pub(super) fn routes() -> Vec<Route> {
    vec![
        route("GET", "/v1/host", "This host", None, Some("HostView"), 200, get(host)),
        route(
            "PUT",
            "/v1/host/bandwidth",
            "Change the bandwidth that all migrations from this host share, until the configuration says something else",
            Some("HostBandwidth"),
            Some("HostBandwidth"),
            200,
            put(set_bandwidth),
        ),
        route("GET", "/v1/host/drain", "How far the drain of this host is", None, Some("Drain"), 200, get(drain)),
        route(
            "POST",
            "/v1/host/drain",
            "Close this host and move its machines away, or go on with that",
            Some("DrainRequest"),
            Some("Drain"),
            202,
            post(start_drain),
        ),
        route("DELETE", "/v1/host/drain", "Open this host again", None, Some("Drain"), 200, delete(end_drain)),
        route(
            "POST",
            "/v1/host/drain/pause",
            "Move no further machine; this host stays closed",
            None,
            Some("Drain"),
            200,
            post(pause_drain),
        ),
    ]
}

fn permit(daemon: &Shared, actor: &Actor, action: Action) -> Result<(), Failure> {
    daemon.permit(actor, action, &format!("host:{}", daemon.config.host), Object::default())
}

async fn host(State(daemon): State<Shared>, Extension(actor): From) -> Answer<HostView> {
    permit(&daemon, &actor, Action::View)?;
    Ok(Json(daemon.host_view().await))
}

async fn set_bandwidth(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Body(wanted): Body<HostBandwidth>,
) -> Answer<HostBandwidth> {
    permit(&daemon, &actor, Action::Host)?;
    spec::bandwidth(wanted.bandwidth_bytes_per_second).map_err(|text| MachineError::Invalid(text.to_owned()))?;
    daemon.executor.set_bandwidth(wanted.bandwidth_bytes_per_second).await?;
    Ok(Json(HostBandwidth { bandwidth_bytes_per_second: daemon.executor.bandwidth().await }))
}

async fn drain(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Drain> {
    permit(&daemon, &actor, Action::View)?;
    Ok(Json(daemon.drain()))
}

async fn start_drain(
    State(daemon): State<Shared>,
    Extension(actor): From,
    Body(request): Body<DrainRequest>,
) -> Result<Response, Failure> {
    permit(&daemon, &actor, Action::Host)?;
    Ok((StatusCode::ACCEPTED, Json(daemon.start_drain(request)?)).into_response())
}

async fn pause_drain(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Drain> {
    permit(&daemon, &actor, Action::Host)?;
    Ok(Json(daemon.pause_drain()?))
}

async fn end_drain(State(daemon): State<Shared>, Extension(actor): From) -> Answer<Drain> {
    permit(&daemon, &actor, Action::Host)?;
    Ok(Json(daemon.end_drain()?))
}
