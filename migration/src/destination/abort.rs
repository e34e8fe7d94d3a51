//! The way back at the destination: discard, and say why.

use std::time::Duration;

use super::context::Context;
use super::link::Failed;
use super::outcome::DestinationError;
use crate::error::MigrationError;

/// How long the reason may take to reach the source.
const LINGER: Duration = Duration::from_millis(500);

/// Ends a migration whose machine did not run here and never will. The source is told first: its guest may be stopped and
/// wait for this word.
pub(super) fn abort(context: &Context, failed: Failed) -> DestinationError {
    let Failed { error, link } = failed;
    let error = if context.control.is_cancelled() { MigrationError::Cancelled } else { error };
    let reason = error.chain();
    // To the source, the words of the machine alone: it adds that they are the destination's.
    let told = match &error {
        MigrationError::Cancelled => "cancelled at the destination".to_owned(),
        _ => reason.clone(),
    };
    tracing::warn!(%reason, "migration ended early; the half-built machine is discarded");
    match link {
        Some(mut link) => {
            link.tell(&told);
            link.end();
            context.guest.discard();
            link.control.linger(LINGER);
        }
        None => context.guest.discard(),
    }
    DestinationError::NotCommitted { reason }
}
