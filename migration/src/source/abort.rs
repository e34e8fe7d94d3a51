//! The way back: the guest runs here again, the destination is told, nothing is left behind.

use std::time::Duration;

use super::context::Context;
use super::link::Failed;
use super::round::stop_tracking;
use crate::error::MigrationError;
use crate::report::Outcome;

/// How long what was said last may take to reach the destination.
const LINGER: Duration = Duration::from_millis(300);

/// Ends a migration that failed. The guest comes first; telling the destination can take its time.
///
/// After Commit there is one way back only: the destination's own word that it did not run the machine. Without it the
/// machine stays fenced and the outcome is [`Outcome::InDoubt`].
pub(super) fn abort(context: &mut Context, failed: Box<Failed>) {
    let Failed { error, link, in_doubt } = *failed;
    context.release_guest();
    context.finish_hints();
    let told = matches!(error, MigrationError::Abandoned { .. } | MigrationError::NobodyListens { .. });
    context.report.transient = !context.control.is_cancelled() && error.is_transient();
    let mut reason = match error {
        // Whatever broke, broke because of the cancel.
        _ if context.control.is_cancelled() => MigrationError::Cancelled.chain(),
        error => error.chain(),
    };
    if in_doubt && told {
        context.report.outcome = Outcome::InDoubt;
    } else if in_doubt {
        context.report.outcome = Outcome::InDoubt;
        reason = format!(
            "Commit was sent and not answered ({reason}); the machine stays fenced here until it is known whether the \
             destination runs it"
        );
    } else {
        let cancelled = context.control.is_cancelled();
        context.report.outcome = if cancelled { Outcome::Cancelled } else { Outcome::Failed };
        if let Some(trouble) = take_back(context) {
            reason = format!("{reason}; {trouble}");
        }
    }
    tracing::warn!(outcome = ?context.report.outcome, %reason, "migration ended early");
    context.report.reason.clone_from(&reason);
    context.stop.raise();
    if let Some(mut link) = link {
        if let Some(running) = link.postcopy.take() {
            running.end();
        }
        link.workers.end();
        // The stop flag would end this too.
        link.control.set_stop(crate::transport::stop::Stop::default());
        link.control.set_deadline(None);
        if !in_doubt {
            link.control.abort(&reason);
        }
        link.control.linger(LINGER);
    }
    stop_tracking(context);
    context.report.total_ms = context.started.elapsed().as_secs_f64() * 1e3;
}

/// The machine runs here again. Returns what went wrong with that, in words.
fn take_back(context: &mut Context) -> Option<String> {
    let mut trouble = None;
    if std::mem::take(&mut context.done.fenced) {
        context.control.uncommit();
        if let Err(error) = context.guest.unfence() {
            trouble = Some(format!("the fence could not be lifted: {error}"));
        }
    }
    context.done.pause_limit = None;
    if std::mem::take(&mut context.done.paused)
        && let Err(error) = context.guest.resume()
    {
        trouble = Some(format!("the guest could not be resumed: {error}; resume it by hand"));
    }
    trouble
}
