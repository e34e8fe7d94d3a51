//! What handlers take out of a request; everything that does not fit becomes a problem document.

use std::time::Duration;

use axum::Json;
use axum::body::{Bytes, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use super::problem::Failure;
use crate::planner::RISKS;

/// Largest request body in bytes; the largest legitimate one is a machine of a few KiB.
pub const BODY_MAX: usize = 1 << 20;

/// For the body of a request, from the end of its head on: whoever sends none keeps one of the places for connections.
const PATIENCE: Duration = Duration::from_secs(30);

/// A JSON body of type `T`.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Failure> {
        let declared =
            request.headers().get("content-length").and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if declared.is_some_and(|length| length > BODY_MAX as u64) {
            return Err(too_large());
        }
        let bytes = read(request.into_body(), PATIENCE).await?;
        // Its error names the field, with the way to it.
        let Json(value) =
            Json::from_bytes(&bytes).map_err(|error| Failure::new(400, "malformed-body", error.body_text()))?;
        Ok(Self(value))
    }
}

/// All of a body that arrives within `patience`.
async fn read(body: axum::body::Body, patience: Duration) -> Result<Bytes, Failure> {
    let late = || {
        let detail = format!("the body did not arrive within {} s: send it with the request", patience.as_secs());
        Failure::new(408, "body-late", detail)
    };
    tokio::time::timeout(patience, to_bytes(body, BODY_MAX)).await.map_err(|_| late())?.map_err(|error| {
        // The limit is the only error that a client can see an answer to.
        let limit = std::error::Error::source(&error).is_some_and(|cause| cause.to_string().contains("length limit"));
        if limit { too_large() } else { Failure::new(400, "body-incomplete", "the body did not arrive whole") }
    })
}

fn too_large() -> Failure {
    Failure::new(413, "body-too-large", format!("the body is larger than {BODY_MAX} bytes: send less"))
}

/// The variable segment of the path.
#[derive(Debug)]
pub struct Segment(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let Path(segment) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|error| Failure::new(400, "malformed-path", error.body_text()))?;
        Ok(Self(segment))
    }
}

/// `?limit=N`, 1 to 10,000; 100 if it is not there.
#[derive(Debug)]
pub struct Limit(pub usize);

impl<S: Send + Sync> FromRequestParts<S> for Limit {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Failure> {
        let query = parts.uri.query().unwrap_or_default();
        let mut limit = 100;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            limit = pair
                .strip_prefix("limit=")
                .and_then(|value| value.parse().ok())
                .filter(|limit| (1..=10_000).contains(limit))
                .ok_or_else(|| Failure::new(400, "malformed-query", format!("`{pair}`: use limit=1 to limit=10000")))?;
        }
        Ok(Self(limit))
    }
}

/// `?risk=R`, an accepted probability; `None` if it is not there.
#[derive(Debug)]
pub struct Risk(pub Option<f64>);

impl<S: Send + Sync> FromRequestParts<S> for Risk {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Failure> {
        let mut risk = None;
        for pair in parts.uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let asked = pair.strip_prefix("risk=").and_then(|value| value.parse().ok());
            let (least, most) = (RISKS.start(), RISKS.end());
            risk = Some(asked.filter(|asked| RISKS.contains(asked)).ok_or_else(|| {
                Failure::new(400, "malformed-query", format!("`{pair}`: use risk={least} to risk={most}"))
            })?);
        }
        Ok(Self(risk))
    }
}

/// An answer of type `T`.
pub type Answer<T> = Result<Json<T>, Failure>;

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use hyper::body::Frame;

    use super::*;

    /// Is declared and never comes.
    struct Never;

    impl hyper::body::Body for Never {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Pending
        }
    }

    #[tokio::test]
    async fn a_body_that_does_not_come_is_not_waited_for_for_ever() {
        let waited = read(axum::body::Body::new(Never), Duration::from_millis(1));
        let answer = tokio::time::timeout(Duration::from_secs(20), waited).await.expect("it still waits");
        assert_eq!(answer.unwrap_err().0.status, 408);
    }
}
