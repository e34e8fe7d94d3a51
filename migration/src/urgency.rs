//! Which threads go first where processors are short.

/// Added to the niceness of threads that carry what nobody waits for. At 5 such a thread gets a quarter of what one gets that the
/// guest waits for: a busy guest slows its own post-copy down and does not stop it.
const BULK_NICENESS: i32 = 5;

/// The calling thread carries what nobody waits for: vCPUs, devices, and the threads that answer the guest's faults go first.
pub(crate) fn carries_bulk() {
    // Needs no permission. On Linux niceness belongs to the thread (sched(7)).
    if let Err(error) = rustix::process::nice(BULK_NICENESS) {
        tracing::debug!(%error, "a thread keeps its niceness");
    }
}
