//! One page, a guest that uses it, lets it go, names it and uses it again, hints that take their time, and a migration: all
//! orders of events, with the protocol's real state machine. A page in use at the end must have arrived as it is.
//!
//! The rules are then broken one by one: for each there is an order of events in which the page is lost, so each is needed.

use std::collections::HashSet;

use super::super::hint::Hinting;

/// What a migration does about hints.
#[derive(Clone, Copy, Debug)]
struct Rules {
    /// A session begins after the dirty log was read, not before.
    after_the_log: bool,
    /// Only hints that follow the guest's word of the session count.
    ids: bool,
    /// What was named in one round says nothing in the next one.
    afresh: bool,
}

const GOOD: Rules = Rules { after_the_log: true, ids: true, afresh: true };
const ROUNDS: usize = 3;
/// Things that the guest does, at most.
const DEEDS: u8 = 6;
/// Hints and words on their way, at most.
const IN_QUEUE: usize = 3;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Message {
    Says(u32),
    Free,
}

/// What a migration does in each round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// Reads the dirty log.
    Collect,
    /// Begins a session of hints.
    Start,
    /// Sends the page, unless it is clean or free.
    Send,
}

#[derive(Clone, Debug)]
struct State {
    // The guest.
    in_use: bool,
    version: u8,
    deeds: u8,
    begun: u32,
    queue: Vec<Message>,
    // The host.
    hinting: Hinting,
    named: bool,
    dirty: bool,
    // The migration.
    steps: usize,
    to_send: bool,
    arrived: u8,
}

impl State {
    fn first() -> Self {
        Self {
            in_use: true,
            version: 1,
            deeds: 0,
            begun: 0,
            queue: Vec::new(),
            hinting: Hinting::new(0),
            named: false,
            dirty: false,
            steps: 0,
            to_send: true,
            arrived: 0,
        }
    }

    fn write(&mut self) {
        self.in_use = true;
        self.version += 1;
        self.dirty = true;
    }

    /// What the guest may do next.
    fn guest(&self) -> Vec<Self> {
        let mut next = Vec::new();
        if self.deeds == DEEDS {
            return next;
        }
        let mut push = |change: &dyn Fn(&mut Self)| {
            let mut state = self.clone();
            state.deeds += 1;
            change(&mut state);
            next.push(state);
        };
        push(&Self::write);
        if self.in_use {
            push(&|state| state.in_use = false);
        }
        if self.queue.len() < IN_QUEUE {
            if !self.in_use && self.begun > 1 {
                push(&|state| state.queue.push(Message::Free));
            }
            if self.begun != self.hinting.shown() {
                push(&|state| {
                    state.begun = state.hinting.shown();
                    state.queue.push(Message::Says(state.begun));
                });
            }
        }
        next
    }

    /// The host takes a message.
    fn host(&self, rules: Rules) -> Option<Self> {
        let mut state = self.clone();
        if state.queue.is_empty() {
            return None;
        }
        match state.queue.remove(0) {
            Message::Says(id) => state.hinting.guest_says(id),
            Message::Free if state.hinting.counts() || (!rules.ids && state.hinting.shown() > 1) => state.named = true,
            Message::Free => {}
        }
        Some(state)
    }

    /// The migration goes on; `None` after its last round, when the guest is stopped.
    fn migrate(&self, rules: Rules) -> Option<Self> {
        let order = match rules.after_the_log {
            true => [Step::Collect, Step::Start, Step::Send],
            false => [Step::Start, Step::Collect, Step::Send],
        };
        if self.steps == ROUNDS * order.len() {
            return None;
        }
        let mut state = self.clone();
        state.steps += 1;
        match order[self.steps % order.len()] {
            Step::Collect => {
                // Round 0 sends everything.
                state.to_send = self.dirty || self.steps < order.len();
                state.dirty = false;
                if rules.after_the_log {
                    state.hinting.stop();
                }
            }
            Step::Start => {
                state.named &= !rules.afresh;
                state.hinting.start();
            }
            Step::Send => {
                if self.to_send && !self.named {
                    state.arrived = self.version;
                }
            }
        }
        Some(state)
    }

    /// The guest is stopped now: the log is read, and what it tells is sent.
    fn is_lost(&self) -> bool {
        self.in_use && !self.dirty && self.arrived != self.version
    }

    fn key(&self) -> String {
        format!("{self:?}")
    }
}

/// An order of events in which the page is lost.
fn counterexample(rules: Rules) -> Option<State> {
    let (mut open, mut seen) = (vec![State::first()], HashSet::new());
    while let Some(state) = open.pop() {
        if !seen.insert(state.key()) {
            continue;
        }
        open.extend(state.guest());
        open.extend(state.host(rules));
        match state.migrate(rules) {
            Some(next) => open.push(next),
            None if state.is_lost() => return Some(state),
            None => {}
        }
    }
    assert!(seen.len() > 1000, "only {} states", seen.len());
    None
}

#[test]
fn no_order_of_events_loses_a_page() {
    assert!(counterexample(GOOD).is_none(), "{:?}", counterexample(GOOD));
}

#[test]
fn each_rule_is_needed() {
    for broken in
        [Rules { ids: false, ..GOOD }, Rules { afresh: false, ..GOOD }, Rules { after_the_log: false, ..GOOD }]
    {
        assert!(counterexample(broken).is_some(), "{broken:?} loses nothing");
    }
}
