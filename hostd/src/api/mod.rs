//! The APIs: for operators on a unix socket, for peers on mutual TLS. HTTP/1.1 and JSON under `/v1`.
//!
//! Every error is an RFC 9457 problem document, also those for paths, methods and bodies that do not exist, do not fit or are
//! too large. `openapi.json` beside this crate describes the control API; a test compares it with the routes and types here.

pub mod body;
pub mod control;
mod host;
mod machines;
mod migration;
pub mod peer;
pub mod problem;
pub mod serve;
mod subject;
pub mod types;

use std::sync::Arc;

use axum::Router;
use axum::routing::MethodRouter;

use crate::daemon::Daemon;
use problem::Failure;

/// Shared by all handlers.
pub type Shared = Arc<Daemon>;

/// One route, with what is needed to describe it.
pub struct Route {
    /// Method.
    pub method: &'static str,
    /// Path with `{}` around variable segments.
    pub path: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// Name of the request body's type.
    pub request: Option<&'static str>,
    /// Name of the answer's type; `[T]` is a list.
    pub response: Option<&'static str>,
    /// Status of success.
    pub status: u16,
    /// Handler.
    pub handler: MethodRouter<Shared>,
}

/// One route of the control API.
fn route(
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    request: Option<&'static str>,
    response: Option<&'static str>,
    status: u16,
    handler: MethodRouter<Shared>,
) -> Route {
    Route { method, path, summary, request, response, status, handler }
}

/// A router of `routes` whose errors are problem documents.
pub fn router(routes: Vec<Route>, daemon: Shared) -> Router {
    let mut router = Router::new();
    for route in routes {
        router = router.route(route.path, route.handler);
    }
    router
        .fallback(|method: axum::http::Method, uri: axum::http::Uri| async move {
            Failure::new(
                404,
                "not-found",
                format!("there is no {method} {}: the API is described in openapi.json", uri.path()),
            )
        })
        .method_not_allowed_fallback(|method: axum::http::Method, uri: axum::http::Uri| async move {
            let detail = format!("{} does not take {method}: openapi.json lists what it takes", uri.path());
            Failure::new(405, "method-not-allowed", detail)
        })
        .with_state(daemon)
}
