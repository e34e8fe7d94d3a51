//! What may go wrong at any moment. A host that dies is both of its processes dying one after the other.

use crate::rules::Next;
use crate::state::{Call, Session, State};

/// Every fault that is possible now.
pub fn all(state: &State, next: &mut Next<'_>) {
    network(state, next);
    crashes(state, next);
    let source = &state.source;
    if source.alive && source.phase.is_some() && source.outcome.is_none() && !source.committed && !source.cancelled {
        next.fault("cancelled at the source", |state| state.source.cancelled = true);
    }
    let there = &state.destination;
    if there.alive && there.arrival.is_none() && !there.committed && !there.cancelled {
        next.fault("cancelled at the destination", |state| state.destination.cancelled = true);
    }
}

fn network(state: &State, next: &mut Next<'_>) {
    let link = &state.link;
    if (link.source_open || link.destination_open) && !link.cut {
        next.fault("the control connection is cut", |state| state.link.cut = true);
    }
    let broken = link.cut || !link.source_open || !link.destination_open;
    if broken && !link.to_destination.is_empty() {
        next.fault("a message to the destination is lost", |state| state.link.to_destination.drop_last());
    }
    if broken && !link.to_source.is_empty() {
        next.fault("a message to the source is lost", |state| state.link.to_source.drop_last());
    }
    if state.session == Session::Up {
        next.fault("the session of post-copy is cut", |state| state.session = Session::Lost);
    }
    if state.reserve != Call::None {
        next.fault("the question for a place, or its answer, is lost", |state| state.reserve = Call::None);
    }
    if state.settle != Call::None {
        next.fault("the question where it runs, or its answer, is lost", |state| state.settle = Call::None);
    }
}

fn crashes(state: &State, next: &mut Next<'_>) {
    let lose_session = |state: &mut State| {
        if state.session == Session::Up {
            state.session = Session::Lost;
        }
    };
    if state.source.alive {
        next.fault("the source's VMM dies", |state| {
            state.source.alive = false;
            state.history.source_crashed = true;
            state.link.close_source();
            lose_session(state);
        });
    }
    if state.destination.alive {
        next.fault("the destination's VMM dies", |state| {
            let destination = &mut state.destination;
            // From the mark on it dies with its process.
            state.history.lost_there |= destination.mark || destination.runs;
            (destination.alive, destination.runs) = (false, false);
            state.link.close_destination();
            lose_session(state);
        });
    }
    if state.here.alive {
        next.fault("the source's daemon dies", |state| {
            state.here.alive = false;
            // Nobody hears the answers any more; a question may still arrive.
            state.reserve = if state.reserve == Call::Request { Call::Request } else { Call::None };
            state.settle = if state.settle == Call::Request { Call::Request } else { Call::None };
        });
    }
    if state.there.alive {
        next.fault("the destination's daemon dies", |state| {
            (state.there.alive, state.there.asked) = (false, false);
            state.settle = if state.settle == Call::Waiting { Call::None } else { state.settle };
        });
    }
}
