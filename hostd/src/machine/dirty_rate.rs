//! How fast machines dirty their memory, asked of their VMMs without a migration.

use super::MachineError;
use super::entry::Entry;
use super::registry::call;
use crate::api::types::{DirtyEstimate, DirtyRate, DirtyRateRequest, DirtyRateSource};
use crate::clock::unix_ms;

/// Has the VMM of a machine estimate its dirty rate, and remembers what it finds for the planner. Whoever asks meanwhile waits for
/// his turn.
///
/// # Errors
///
/// [`MachineError::Api`] if it refuses or does not answer.
pub async fn estimate(entry: &Entry, request: DirtyRateRequest) -> Result<DirtyRate, MachineError> {
    let _turn = entry.estimate.lock().await;
    let rate = call(entry, move |client| client.dirty_rate(&request)).await?;
    // What a migration measures is no rate of the machine as it is without one, and is learned from at its end.
    if rate.source == DirtyRateSource::Sampled
        && let Some(bytes_per_second) = rate.peak_bytes_per_second.or(rate.bytes_per_second)
    {
        let working_set_bytes = rate.working_set_bytes;
        entry.state().dirty = Some(DirtyEstimate { bytes_per_second, working_set_bytes, at_unix_ms: unix_ms() });
    }
    Ok(rate)
}
