//! Fits trees anew, on a thread that runs when nothing else wants to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::Daemon;
use crate::flag::stopped;
use crate::planner::refit::Allowance;

/// How often it is looked whether something is due; and how long after the start for the first time, when peers have been heard.
const EVERY: Duration = Duration::from_secs(30);

/// The least urgent that setpriority(2) knows.
const NICEST: libc::c_int = 19;

/// Once in [`EVERY`], until the daemon stops.
pub(super) async fn run(daemon: Arc<Daemon>, mut stop: watch::Receiver<bool>) {
    let mut allowance = Allowance::default();
    let mut since = Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stopped(&mut stop) => return,
        }
        allowance.earn(since.elapsed());
        since = Instant::now();
        let (over, left) = oneshot::channel();
        let (daemon, ending) = (Arc::clone(&daemon), stop.clone());
        // A thread of its own, since its priority cannot be raised again without privileges.
        let work = move || {
            lower_priority();
            _ = over.send(fit(&daemon, allowance, &ending));
        };
        if let Err(error) = std::thread::Builder::new().name("refit".to_owned()).spawn(work) {
            tracing::warn!(%error, "no thread to fit trees on: forecasts go on with those fitted last");
            continue;
        }
        tokio::select! {
            left = left => allowance = left.unwrap_or_default(),
            () = stopped(&mut stop) => return,
        }
    }
}

/// Does what is due. The planner is held only to copy what a fit takes, and to take its trees.
fn fit(daemon: &Daemon, mut allowance: Allowance, stop: &watch::Receiver<bool>) -> Allowance {
    while !*stop.borrow() {
        let Some(work) = allowance.spend(&mut daemon.planner()) else { break };
        let done = work.run();
        daemon.planner().end_refit(done);
    }
    allowance
}

/// Of the calling thread only.
fn lower_priority() {
    // SAFETY: setpriority(2) takes three numbers; on Linux `PRIO_PROCESS` with 0 is the calling thread.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICEST) };
    if result != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "trees are fitted at the usual priority");
    }
}
