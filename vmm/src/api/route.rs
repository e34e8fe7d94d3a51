//! Which request does what, and which status an error has.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Save;
use crate::disk::DiskError;
use crate::migrate::{JobError, chain};
use crate::service::{Service, ServiceError};
use crate::vm::MachineError;

/// What is left to do once an answer is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    Nothing,
    Quit,
}

/// An answer, ready to be sent.
#[derive(Debug)]
pub(super) struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
    pub after: After,
}

type Handler = fn(&Service, &[u8]) -> Result<Answer, Answer>;

/// The table of the [module](super).
const ROUTES: [(&str, &str, Handler); 20] = [
    ("GET", "/v1/machine", |service, _| json(200, &service.info())),
    ("PUT", "/v1/machine/pause", |service, _| json(200, &service.pause().map_err(problem)?)),
    ("PUT", "/v1/machine/resume", |service, _| json(200, &service.resume().map_err(problem)?)),
    ("PUT", "/v1/machine/shut-down", |service, _| json(202, &service.ask_to_shut_down().map_err(problem)?)),
    ("PUT", "/v1/machine/save", |service, body| {
        let save: Save = parse(body)?;
        json(200, &service.save(&save.path).map_err(problem)?)
    }),
    ("GET", "/v1/machine/digest", |service, _| json(200, &service.digest().map_err(problem)?)),
    ("PUT", "/v1/machine/dirty-rate", |service, body| json(200, &service.dirty_rate(parse(body)?).map_err(problem)?)),
    ("PUT", "/v1/machine/disk", |service, body| json(200, &service.resize_disk(&parse(body)?).map_err(problem)?)),
    ("PUT", "/v1/machine/quit", |_, _| Ok(Answer { status: 204, body: Vec::new(), after: After::Quit })),
    ("GET", "/v1/metrics", |service, _| json(200, &service.metrics())),
    ("GET", "/v1/balloon", |service, _| json(200, &service.balloon().map_err(problem)?)),
    ("PUT", "/v1/balloon", |service, body| json(200, &service.inflate(&parse(body)?).map_err(problem)?)),
    ("PUT", "/v1/migration/receive", |service, body| json(200, &service.receive(parse(body)?).map_err(problem)?)),
    ("PUT", "/v1/migration/send", |service, body| json(202, &service.send(parse(body)?).map_err(problem)?)),
    ("GET", "/v1/migration", |service, _| json(200, &service.migration().map_err(problem)?)),
    ("DELETE", "/v1/migration", |service, _| json(202, &service.cancel().map_err(problem)?)),
    ("PUT", "/v1/migration/limits", |service, body| json(200, &service.change_limits(&parse(body)?).map_err(problem)?)),
    ("PUT", "/v1/migration/continue", |service, _| json(200, &service.proceed().map_err(problem)?)),
    ("PUT", "/v1/migration/abandon", |service, _| json(202, &service.abandon().map_err(problem)?)),
    ("PUT", "/v1/migration/settle", |service, body| json(200, &service.settle(parse(body)?).map_err(problem)?)),
];

/// Serves one request.
pub(super) fn answer(service: &Service, method: &str, path: &str, body: &[u8]) -> Answer {
    let mut here = ROUTES.iter().filter(|route| route.1 == path).peekable();
    if here.peek().is_none() {
        return Answer::problem(
            404,
            format!("there is no {path}: see the table of requests in the API's documentation"),
        );
    }
    let methods: Vec<&str> = here.clone().map(|route| route.0).collect();
    match here.find(|route| route.0 == method) {
        Some((.., handler)) => handler(service, body).unwrap_or_else(|problem| problem),
        None => Answer::problem(405, format!("{path} knows {}, not {method}", methods.join(" and "))),
    }
}

fn json(status: u16, value: &impl Serialize) -> Result<Answer, Answer> {
    let body = serde_json::to_vec(value).map_err(|error| Answer::problem(500, error.to_string()))?;
    Ok(Answer { status, body, after: After::Nothing })
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Answer> {
    serde_json::from_slice(body)
        .map_err(|error| Answer::problem(422, format!("the body is not what this request takes: {error}")))
}

fn problem(error: impl Into<ServiceError>) -> Answer {
    let error = error.into();
    let status = match &error {
        ServiceError::NoMigration | ServiceError::NoBalloon => 404,
        ServiceError::Target(_) | ServiceError::Interval(_) => 422,
        ServiceError::Machine(MachineError::NoDisk { .. }) => 404,
        ServiceError::Machine(MachineError::Disk(
            DiskError::Size { .. } | DiskError::Shrink { .. } | DiskError::Unlike { .. },
        )) => 422,
        ServiceError::Memory(_) => 500,
        ServiceError::Job(JobError::Token | JobError::Name { .. } | JobError::Limit { .. }) => 422,
        ServiceError::Job(JobError::Thread(_)) | ServiceError::Digest(_) | ServiceError::Snapshot(_) => {
            if conflicts(&error) { 409 } else { 500 }
        }
        _ => 409,
    };
    Answer::problem(status, chain(&error))
}

/// Errors of a machine in the wrong state stay conflicts, whatever they are wrapped in.
fn conflicts(error: &ServiceError) -> bool {
    use crate::snapshot::SnapshotError;
    use crate::vm::DigestError;
    matches!(
        error,
        ServiceError::Digest(DigestError::Machine(_))
            | ServiceError::Snapshot(SnapshotError::State(_) | SnapshotError::Exists(_))
    )
}
