//! What the engines in both VMMs do: `migration::source` and `migration::destination`.

use migration::control::Phase;

use crate::rules::{Mutation, Next};
use crate::state::{Arrival, Message, Outcome, Session, State};

/// `source::abort`: it runs here as before, and the destination is told.
fn source_aborts(state: &mut State) {
    let source = &mut state.source;
    (source.paused, source.fenced, source.committed) = (false, false, false);
    source.outcome = Some(Outcome::Failed);
    state.link.say_to_destination(Message::Abort);
    source_ends(state);
}

fn source_ends(state: &mut State) {
    state.source.phase = Some(Phase::Ended);
    state.link.close_source();
    if state.session == Session::Up {
        state.session = Session::Lost;
    }
}

fn source_doubts(state: &mut State) {
    state.source.outcome = Some(Outcome::InDoubt);
    source_ends(state);
}

/// One step of the source's engine.
pub fn source(state: &State, next: &mut Next<'_>) {
    let source = &state.source;
    let (true, Some(phase), None) = (source.alive, source.phase, source.outcome) else { return };
    match phase {
        Phase::Handshake if !state.link.source_open => connect(state, next),
        Phase::Handshake | Phase::Precopy | Phase::Switchover => before_commit(state, next),
        Phase::Committed => committed(state, next),
        Phase::Postcopy => source_postcopy(state, next),
        Phase::Verify => next.step("source: verified", |state| {
            state.source.outcome = Some(Outcome::Completed);
            source_ends(state);
        }),
        Phase::Ended => {}
    }
}

fn connect(state: &State, next: &mut Next<'_>) {
    let destination = &state.destination;
    if destination.listens() && destination.phase == Some(Phase::Handshake) && !destination.cancelled {
        next.step("source: connects, Layout", |state| {
            (state.link.source_open, state.link.destination_open) = (true, true);
            state.link.say_to_destination(Message::Layout);
        });
        next.fault("source: cannot connect", source_aborts);
    } else {
        next.step("source: is refused", source_aborts);
    }
}

fn before_commit(state: &State, next: &mut Next<'_>) {
    next.fault("source: a failure before Commit", source_aborts);
    if state.source.cancelled || state.link.lost_to_source() {
        return next.step("source: cancelled, or link lost before Commit", source_aborts);
    }
    let (asked, attached) = state.source.postcopy;
    if state.source.phase == Some(Phase::Precopy) && asked == attached {
        next.step("source: pauses, State", |state| {
            state.source.phase = Some(Phase::Switchover);
            state.source.paused = true;
            state.link.say_to_destination(Message::State);
        });
        if !asked {
            next.step("source: PostcopyPrepare", |state| {
                state.source.postcopy.0 = true;
                state.link.say_to_destination(Message::PostcopyPrepare);
            });
        }
    }
    let Some(message) = state.link.to_source.first() else { return };
    next.step("source: takes a message", |state| {
        state.link.to_source.pop();
        match (message, state.source.phase) {
            (Message::Ready, Some(Phase::Handshake)) => state.source.phase = Some(Phase::Precopy),
            (Message::PostcopyReady, Some(Phase::Precopy)) => state.source.postcopy.1 = true,
            (Message::Prepared, Some(Phase::Switchover)) => {
                state.source.phase = Some(Phase::Committed);
                (state.source.committed, state.source.fenced) = (true, true);
                state.link.say_to_destination(Message::Commit);
                state.history.commit_sent = true;
            }
            _ => source_aborts(state),
        }
    });
}

fn committed(state: &State, next: &mut Next<'_>) {
    let unanswered = |state: &mut State, mutation: Option<Mutation>| {
        if mutation == Some(Mutation::SourceResumesOnLossAfterCommit) {
            source_aborts(state);
        } else if state.source.postcopy.1 {
            state.source.phase = Some(Phase::Postcopy);
            state.link.close_source();
        } else {
            source_doubts(state);
        }
    };
    let mutation = next.mutation;
    next.fault("source: no answer to Commit in time", |state| unanswered(state, mutation));
    if state.link.lost_to_source() {
        return next.step("source: link lost after Commit", |state| unanswered(state, mutation));
    }
    let Some(message) = state.link.to_source.first() else { return };
    next.step("source: takes the answer to Commit", |state| {
        state.link.to_source.pop();
        match message {
            Message::Resumed if state.source.postcopy.1 => state.source.phase = Some(Phase::Postcopy),
            Message::Resumed => state.source.phase = Some(Phase::Verify),
            Message::Abort => {
                state.history.never_said = true;
                source_aborts(state);
            }
            _ => source_doubts(state),
        }
    });
}

fn source_postcopy(state: &State, next: &mut Next<'_>) {
    let destination = &state.destination;
    if state.session == Session::Up {
        if destination.alive && destination.complete {
            next.step("source: Complete", |state| state.source.phase = Some(Phase::Verify));
        }
        return;
    }
    next.fault("source: post-copy is abandoned by the operator", |state| {
        state.history.lost_there = true;
        source_doubts(state);
    });
    if next.mutation == Some(Mutation::SourceGivesUpWhileTheDestinationWaits) {
        next.fault("source: gives up reconnecting", source_doubts);
    }
    if !destination.listens() {
        next.step("source: nobody listens there any more", source_doubts);
    } else if destination.phase == Some(Phase::Postcopy) {
        next.step("source: reconnects", |state| state.session = Session::Up);
    } else {
        next.step("source: reconnects before Commit has arrived", |state| state.destination.fate_failed = true);
    }
}

/// `destination::abort`: the source is told, and nothing is kept.
fn destination_aborts(state: &mut State) {
    let destination = &mut state.destination;
    (destination.runs, destination.committed, destination.mark) = (false, false, false);
    destination.arrival = Some(Arrival::NotCommitted);
    state.link.say_to_source(Message::Abort);
    destination_ends(state);
}

fn destination_ends(state: &mut State) {
    state.destination.phase = Some(Phase::Ended);
    state.link.close_destination();
    if state.session == Session::Up {
        state.session = Session::Lost;
    }
}

fn runs(state: &mut State) {
    state.destination.runs = true;
    state.history.ran_there = true;
}

/// One step of the destination's engine.
pub fn destination(state: &State, next: &mut Next<'_>) {
    let destination = &state.destination;
    let (true, Some(phase), None) = (destination.alive, destination.phase, destination.arrival) else { return };
    match phase {
        Phase::Handshake | Phase::Precopy | Phase::Switchover if !destination.commit_arrived => waits(state, next),
        Phase::Handshake | Phase::Precopy => {}
        Phase::Switchover => next.step("destination: takes the decision to commit", |state| {
            if state.destination.cancelled {
                return destination_aborts(state);
            }
            state.destination.committed = true;
            state.destination.phase = Some(Phase::Committed);
        }),
        Phase::Committed => starts(state, next),
        Phase::Postcopy => destination_postcopy(state, next),
        Phase::Verify => next.step("destination: verified", |state| {
            state.destination.arrival = Some(Arrival::Received);
            destination_ends(state);
        }),
        Phase::Ended => {}
    }
}

/// Before Commit has arrived.
fn waits(state: &State, next: &mut Next<'_>) {
    let destination = &state.destination;
    next.fault("destination: a failure before Commit", destination_aborts);
    if destination.postcopy && state.session == Session::Lost && !destination.fate_failed {
        next.step("destination: the session is lost before Commit", |state| state.destination.fate_failed = true);
    }
    if destination.cancelled {
        return next.step("destination: cancelled", destination_aborts);
    }
    if !state.link.destination_open {
        return next.step("destination: nobody came", destination_aborts);
    }
    let mutation = next.mutation;
    if state.link.lost_to_destination() {
        return next.step("destination: link lost before Commit", |state| {
            if mutation == Some(Mutation::DestinationRunsOnLossAfterPrepared) && state.destination.prepared {
                return runs(state);
            }
            destination_aborts(state);
        });
    }
    if destination.phase == Some(Phase::Switchover) && !destination.prepared {
        return next.step("destination: restores, Prepared", |state| {
            if state.destination.fate_failed {
                return destination_aborts(state);
            }
            state.destination.prepared = true;
            state.link.say_to_source(Message::Prepared);
            if mutation == Some(Mutation::DestinationRunsBeforeCommit) {
                runs(state);
            }
        });
    }
    let Some(message) = state.link.to_destination.first() else { return };
    next.step("destination: takes a message", |state| {
        state.link.to_destination.pop();
        match (message, state.destination.phase) {
            (Message::Layout, Some(Phase::Handshake)) => {
                state.destination.phase = Some(Phase::Precopy);
                state.link.say_to_source(Message::Ready);
            }
            (Message::PostcopyPrepare, Some(Phase::Precopy)) => {
                state.destination.postcopy = true;
                state.session = Session::Up;
                state.link.say_to_source(Message::PostcopyReady);
            }
            (Message::State, Some(Phase::Precopy)) => state.destination.phase = Some(Phase::Switchover),
            (Message::Commit, Some(Phase::Switchover)) => state.destination.commit_arrived = true,
            _ => destination_aborts(state),
        }
    });
}

/// After the decision.
fn starts(state: &State, next: &mut Next<'_>) {
    let destination = &state.destination;
    if destination.runs {
        return next.step("destination: Resumed", |state| {
            let postcopy = state.destination.postcopy;
            state.destination.phase = Some(if postcopy { Phase::Postcopy } else { Phase::Verify });
            state.link.say_to_source(Message::Resumed);
        });
    }
    if destination.fate_failed {
        return next.step("destination: the session had failed before", destination_aborts);
    }
    next.fault("destination: the machine cannot be started", destination_aborts);
    let unmarked = next.mutation == Some(Mutation::NoMark);
    if destination.mark || unmarked {
        next.step("destination: runs the machine", runs);
    } else {
        next.step("destination: leaves a mark", |state| state.destination.mark = true);
    }
}

/// A part of it will never arrive: the guest is stopped.
pub fn loses(state: &mut State) {
    state.destination.runs = false;
    state.destination.arrival = Some(Arrival::Lost);
    state.history.lost_there = true;
    destination_ends(state);
}

fn destination_postcopy(state: &State, next: &mut Next<'_>) {
    next.fault("destination: post-copy breaks, or is not waited for any longer", loses);
    let nobody = !state.source.alive || state.source.outcome.is_some();
    if nobody && state.session == Session::Lost && !state.destination.complete {
        next.step("destination: the source does not come back", loses);
    }
    let source_knows = matches!(state.source.phase, Some(Phase::Verify | Phase::Ended));
    match (state.destination.complete, state.session) {
        (false, Session::Up) => next.step("destination: Complete", |state| state.destination.complete = true),
        (true, Session::Up) if !source_knows => {}
        (true, _) => next.step("destination: CompleteAck, or the last call is over", |state| {
            state.destination.phase = Some(Phase::Verify);
        }),
        (false, _) => {}
    }
}
