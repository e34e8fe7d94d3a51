//! Write mirroring: a write of the guest is answered once what it changed has arrived at the destination.
//!
//! A guest that writes to its disk faster than the link carries never lets rounds converge. Held to what the link carries it
//! does, since what is dirty is never more than what is unanswered (Mashtizadeh et al., USENIX ATC 2011). Only answers are
//! held: the map of dirty blocks stays what decides what is sent, so nothing is lost whenever they are let go.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Longest time for which the answer to a write may be held: a link that has gone quiet must not look like a dead disk.
pub const HOLD_MOST: Duration = Duration::from_secs(1);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Rung when there may be something to do.
#[derive(Debug, Default)]
pub struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    /// Whoever waits, or waits next, looks.
    pub fn ring(&self) {
        *locked(&self.rung) = true;
        self.changed.notify_all();
    }

    /// Waits until it has rung since the last call, at most for `timeout`.
    pub fn wait(&self, timeout: Duration) {
        let wait = self.changed.wait_timeout_while(locked(&self.rung), timeout, |rung| !*rung);
        *wait.unwrap_or_else(PoisonError::into_inner).0 = false;
    }
}

/// What a held answer waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// Of one disk: which writes may be answered.
///
/// The device marks the blocks of a write that is done, *then* asks for a ticket. A collection is announced, *then* takes the
/// marks. So the collection that a ticket waits for has the marks that were made before it, whatever the interleaving.
#[derive(Debug, Default)]
pub struct Gate {
    shut: AtomicBool,
    /// Collections announced.
    collections: AtomicU64,
    /// The last of them that has arrived.
    arrived: AtomicU64,
    bell: Mutex<Option<Arc<Bell>>>,
}

impl Gate {
    /// From here on writes wait. `bell` is rung when one does.
    pub fn shut(&self, bell: Arc<Bell>) {
        *locked(&self.bell) = Some(bell);
        self.shut.store(true, Ordering::SeqCst);
    }

    /// No write waits any more. Idempotent.
    pub fn open(&self) {
        self.shut.store(false, Ordering::SeqCst);
        *locked(&self.bell) = None;
    }

    /// Whether writes wait.
    pub fn is_shut(&self) -> bool {
        self.shut.load(Ordering::SeqCst)
    }

    /// The map of dirty blocks is about to be taken.
    pub fn collect(&self) {
        self.collections.fetch_add(1, Ordering::SeqCst);
    }

    /// All that has been collected has arrived.
    pub fn arrive(&self) {
        self.arrived.store(self.collections.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    /// For a write that is done and marked; `None` if it may be answered at once.
    pub fn ticket(&self) -> Option<Ticket> {
        if !self.is_shut() {
            return None;
        }
        // A collection that has been announced may have passed the marks already: the one after it has them for certain.
        let ticket = Ticket(self.collections.load(Ordering::SeqCst) + 1);
        let bell = locked(&self.bell).clone();
        bell.inspect(|bell| bell.ring()).map(|_| ticket)
    }

    /// Whether what `ticket` waits for has happened.
    pub fn passes(&self, ticket: Ticket) -> bool {
        !self.is_shut() || self.arrived.load(Ordering::SeqCst) >= ticket.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_waits_for_the_collection_that_has_it_for_certain() {
        let (gate, bell) = (Gate::default(), Arc::new(Bell::default()));
        assert_eq!(gate.ticket(), None);
        gate.shut(Arc::clone(&bell));
        gate.collect();
        // That collection may have looked before the mark was made.
        let ticket = gate.ticket().unwrap();
        gate.arrive();
        assert!(!gate.passes(ticket));
        gate.collect();
        assert!(!gate.passes(ticket), "collected, not arrived");
        gate.arrive();
        assert!(gate.passes(ticket));
        let late = gate.ticket().unwrap();
        assert!(!gate.passes(late));
        gate.open();
        assert!(gate.passes(late) && gate.ticket().is_none());
    }

    #[test]
    fn the_bell_is_heard_by_who_comes_later() {
        let bell = Arc::new(Bell::default());
        bell.ring();
        bell.wait(Duration::from_secs(60));
        let ringer = Arc::clone(&bell);
        let thread = std::thread::spawn(move || ringer.ring());
        bell.wait(Duration::from_secs(60));
        thread.join().unwrap();
    }
}
