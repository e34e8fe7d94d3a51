//! Bodies of requests to `hostd`, from an operator or a peer; the first byte says which.

use hostd::api::types::{CreateMachine, MigrateRequest, NewEvent};
use hostd::config::HostConfig;
use hostd::machine::spec;
use hostd::pool::wire::ReserveRequest;
use serde_json::from_slice;

/// Decodes a body, and checks it as the daemon does before it acts on it.
pub fn body(data: &[u8]) {
    accepts(data);
}

/// The same, and whether it would be acted on.
pub fn accepts(data: &[u8]) -> bool {
    let Some((&which, body)) = data.split_first() else { return false };
    match which {
        b'c' => from_slice::<CreateMachine>(body).is_ok_and(|request| spec::check(&request).is_ok()),
        b'm' => from_slice::<MigrateRequest>(body)
            .is_ok_and(|request| request.limits.is_none_or(|limits| spec::limits(&limits).is_ok())),
        b'r' => from_slice::<ReserveRequest>(body).is_ok_and(|request| spec::check_arrival(&request.machine).is_ok()),
        b'e' => from_slice::<NewEvent>(body).is_ok(),
        b'h' => from_slice::<HostConfig>(body).is_ok_and(|config| config.mistakes().is_empty()),
        _ => false,
    }
}
