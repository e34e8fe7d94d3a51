//! One estimate at a time, and a way to end it early.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Whose turn it is to estimate.
#[derive(Debug, Default)]
pub struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Free,
    Taken,
    Ended,
}

impl Turns {
    /// Takes the turn; `None` if somebody has it.
    pub fn take(&self) -> Option<Turn<'_>> {
        let mut state = self.lock();
        (*state == State::Free).then(|| {
            *state = State::Taken;
            Turn(self)
        })
    }

    /// Ends the estimate that is under way, if there is one. Returns at once; it reads a few more pages at most.
    pub fn end(&self) {
        let mut state = self.lock();
        if *state == State::Taken {
            *state = State::Ended;
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The turn; given back on drop.
#[derive(Debug)]
pub struct Turn<'a>(&'a Turns);

impl Turn<'_> {
    /// Waits until a moment; false as soon as the turn is ended early.
    pub fn wait_until(&self, moment: Instant) -> bool {
        let mut state = self.0.lock();
        loop {
            let left = moment.saturating_duration_since(Instant::now());
            if *state == State::Ended || left.is_zero() {
                return *state != State::Ended;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether to stop.
    pub fn ended(&self) -> bool {
        *self.0.lock() == State::Ended
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.lock() = State::Free;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn one_at_a_time_and_ended_early() {
        let turns = Turns::default();
        turns.end();
        let turn = turns.take().expect("nobody has it, and ending nothing leaves nothing behind");
        assert!(turns.take().is_none());
        assert!(turn.wait_until(Instant::now() + Duration::from_millis(1)) && !turn.ended());
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| turn.wait_until(Instant::now() + Duration::from_secs(600)));
            turns.end();
            assert!(!waits.join().unwrap());
        });
        assert!(turn.ended() && turns.take().is_none(), "it is still at work");
        drop(turn);
        assert!(turns.take().is_some_and(|turn| !turn.ended()));
    }
}
