//! Errors as RFC 9457 problem documents.

use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use vmm::api::Problem;

use crate::machine::{MachineError, chain};
use crate::pool::PeerError;
use crate::store::StoreError;

/// A request that failed.
#[derive(Clone, Debug)]
pub struct Failure(pub Problem);

impl Failure {
    /// A problem of a `kind` such as `no-room`.
    pub fn new(status: u16, kind: &str, detail: impl Into<String>) -> Self {
        let title = kind.replace('-', " ");
        Self(Problem { kind: format!("urn:headroom:problem:{kind}"), title, status, detail: detail.into() })
    }

    /// That an error is, with all its causes.
    pub(crate) fn of(status: u16, kind: &str, error: &dyn std::error::Error) -> Self {
        Self::new(status, kind, chain(error))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let kind = header::HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }
}

impl From<MachineError> for Failure {
    fn from(error: MachineError) -> Self {
        let (status, kind) = match &error {
            MachineError::Invalid(_) => (400, "invalid-request"),
            MachineError::Unknown(_) => (404, "no-such-machine"),
            MachineError::Exists(_) => (409, "machine-exists"),
            MachineError::State { .. } => (409, "wrong-state"),
            MachineError::StillRuns { .. } => (409, "still-runs"),
            MachineError::NoDisk { .. } => (404, "no-such-disk"),
            MachineError::NoRoom { .. } => (507, "no-room"),
            MachineError::Disk { .. } | MachineError::Image(_) => (422, "disk-unusable"),
            MachineError::NotShared { .. } => (422, "disk-not-shared"),
            MachineError::Tap(_) => (500, "tap-failed"),
            MachineError::File { .. } => (500, "file-failed"),
            MachineError::NoVmm { .. } | MachineError::Spawn { .. } => (500, "vmm-missing"),
            MachineError::Vmm { .. } => (500, "vmm-failed"),
            // What the VMM says of a request, and not that it failed.
            MachineError::Api { source, .. } => {
                (source.status().filter(|status| *status < 500).unwrap_or(502), "vmm-refused")
            }
            MachineError::Store(_) => (500, "store-failed"),
        };
        Self::of(status, kind, &error)
    }
}

impl From<PeerError> for Failure {
    fn from(error: PeerError) -> Self {
        let (status, kind) = match &error {
            PeerError::Unreachable { .. } => (502, "peer-unreachable"),
            PeerError::Silent { .. } => (504, "peer-silent"),
            PeerError::Refused { .. } => (502, "peer-refused"),
            PeerError::Decode { .. } => (502, "peer-not-understood"),
        };
        Self::of(status, kind, &error)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::of(500, "store-failed", &error)
    }
}
