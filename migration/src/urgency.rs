//! Which threads go first where processors are short.
//!
//! A migration is for guests that already get too little: what it sends ahead must not take their processors. What a guest
//! stands still for must not wait behind other guests either.

use std::time::{Duration, Instant};

use rustix::process::{getpriority_process, nice, setpriority_process};
use rustix::thread::{Pid, gettid, sched_yield};

/// Added to the niceness of threads that carry what nobody waits for: such a thread gets half of what one gets that the guest waits for,
/// and less since it passes its turns ([`Turns`]). A busy guest slows its own migration down and does not stop it. Why not more:
/// `docs/design/0010`.
const BULK_NICENESS: i32 = 3;

/// A thread that carries what nobody waits for: vCPUs, devices, and the threads that answer the guest's faults go first.
///
/// On Linux niceness belongs to the thread (sched(7)).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bulk {
    thread: Pid,
    /// Niceness before.
    usual: Option<i32>,
}

impl Bulk {
    /// Makes the calling thread one.
    pub(crate) fn here() -> Self {
        let usual = getpriority_process(None).ok();
        // Needs no permission.
        if let Err(error) = nice(BULK_NICENESS) {
            tracing::debug!(%error, "a thread keeps its niceness");
        }
        Self { thread: gettid(), usual }
    }

    /// Now the guest waits for it, or it is done with that. Needs `CAP_SYS_NICE` or a limit `RLIMIT_NICE` that allows the thread what it had before:
    /// without, it stays as it is, and a guest on a crowded host stands still for longer.
    pub(crate) fn hurry(&self) {
        let Some(usual) = self.usual else { return };
        if let Err(error) = setpriority_process(Some(self.thread), usual) {
            tracing::debug!(%error, "a thread does not get its niceness back; allow it by LimitNICE");
        }
    }
}

/// So long such a thread works in one go.
const TURN: Duration = Duration::from_millis(1);

/// The turns of a thread that carries what nobody waits for.
///
/// Niceness says how much of a processor a thread gets, and not in which pieces: who has to wait for one, waits for a tick of the clock
/// or two, 4 to 10 ms each. So such a thread offers its processor to others by itself, once in a while; where nobody wants it, that costs
/// one system call.
#[derive(Debug)]
pub(crate) struct Turns {
    since: Instant,
}

impl Turns {
    /// The first begins now.
    pub(crate) fn new() -> Self {
        Self { since: Instant::now() }
    }

    /// Between two pieces of work, each well below a millisecond.
    pub(crate) fn pass(&mut self) {
        if self.since.elapsed() >= TURN {
            sched_yield();
            self.since = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_niced_alone_and_another_can_hurry_it() {
        let before = getpriority_process(None).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(Bulk::here()).unwrap();
            let _ = ended.recv();
        });
        let bulk = told.recv().unwrap();
        let niceness = || getpriority_process(Some(bulk.thread)).unwrap();
        assert_eq!(niceness(), (before + BULK_NICENESS).min(19));
        assert_eq!(getpriority_process(None).unwrap(), before);
        let permitted = setpriority_process(Some(bulk.thread), before).is_ok();
        bulk.hurry();
        assert_eq!(niceness(), if permitted { before } else { (before + BULK_NICENESS).min(19) });
        drop(end);
        thread.join().unwrap();
    }
}
