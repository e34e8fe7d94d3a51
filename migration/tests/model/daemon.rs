//! What the daemons do: `hostd::executor`, with what they store and what they forget when they die.

use migration::control::Phase;

use crate::rules::{Mutation, Next};
use crate::state::{Arrival, Call, Outcome, Session, Settlement, Stage, State, Status, Task};

/// `Executor::stay`: the machine's status is stored first, then the migration's stage.
fn stays(state: &mut State) {
    let there_is_a_process = state.source.alive || state.source.cold;
    state.here.status = if there_is_a_process { Status::Running } else { Status::Stopped };
    state.here.task = Task::Stay;
    state.settle = Call::None;
}

/// One step of the source's daemon.
pub fn source(state: &State, next: &mut Next<'_>) {
    let here = &state.here;
    if !here.alive {
        return next.step("source daemon: starts again", starts_again);
    }
    let ended = !state.source.alive && !state.source.cold;
    let unguarded = next.mutation == Some(Mutation::StoppedWhileInDoubt);
    let noticed = match here.status {
        Status::Running => true,
        Status::Migrating | Status::InDoubt => unguarded,
        _ => false,
    };
    if ended && noticed {
        next.step("source daemon: notices the end of the VMM", |state| state.here.status = Status::Stopped);
    }
    // What became of a lost machine was said, with the disks that there are: that start is the operator's own decision.
    if here.status == Status::Stopped && ended && here.stage != Stage::Lost {
        next.fault("source daemon: an operator starts the machine", |state| {
            state.source.cold = true;
            state.here.status = Status::Running;
        });
    }
    match here.task {
        Task::Reserve => reserves(state, next),
        Task::Send => sends(state, next),
        Task::Follow => follows(state, next),
        Task::GiveBack => gives_back(state, next),
        Task::Settle => settles(state, next),
        Task::Tell(settlement) => tells(settlement, next),
        Task::Leave => leaves(state, next),
        Task::Stay => next.step("source daemon: stores that it stays", |state| {
            (state.here.stage, state.here.task) = (Stage::Failed, Task::Idle);
        }),
        Task::Idle => {}
    }
}

/// `Machines::recover`, then `Executor::recover`.
fn starts_again(state: &mut State) {
    state.here.alive = true;
    if state.here.status == Status::Deleting {
        (state.source.alive, state.source.cold) = (false, false);
        state.here.status = Status::Gone;
    }
    if !state.here.stage.ended() && state.here.status == Status::Gone {
        state.here.stage = Stage::Completed;
    }
    state.here.task = if state.here.stage.ended() {
        Task::Idle
    } else if state.source.cold {
        Task::GiveBack
    } else if !state.source.alive {
        Task::Settle
    } else if state.source.phase.is_some() {
        Task::Follow
    } else {
        Task::GiveBack
    };
}

fn reserves(state: &State, next: &mut Next<'_>) {
    match state.reserve {
        Call::None => {
            next.step("source daemon: asks for a place", |state| state.reserve = Call::Request);
            next.step("source daemon: gives up asking", |state| state.here.task = Task::GiveBack);
        }
        Call::Reply(accepted) => next.step("source daemon: hears of the place", |state| {
            state.reserve = Call::None;
            if accepted {
                (state.here.stage, state.here.task) = (Stage::Transferring, Task::Send);
            } else {
                stays(state);
            }
        }),
        // Its request may still arrive.
        Call::Request | Call::Waiting => {
            next.fault("source daemon: no answer in time", |state| state.here.task = Task::GiveBack);
        }
    }
}

fn sends(state: &State, next: &mut Next<'_>) {
    if !state.source.alive {
        return next.step("source daemon: nobody is there to send", |state| state.here.task = Task::GiveBack);
    }
    next.step("source daemon: has its VMM send", |state| {
        state.source.phase = Some(Phase::Handshake);
        state.here.task = Task::Follow;
    });
    let forgets = next.mutation == Some(Mutation::UnansweredSendIsForgotten);
    next.fault("source daemon: its VMM does not answer whether it sends", |state| {
        state.source.phase = Some(Phase::Handshake);
        state.here.task = if forgets { Task::GiveBack } else { Task::Follow };
    });
}

fn follows(state: &State, next: &mut Next<'_>) {
    let task = match (state.source.alive, state.source.phase, state.source.outcome) {
        (false, _, _) | (_, None, _) | (_, _, Some(Outcome::InDoubt)) => Task::Settle,
        (_, _, Some(Outcome::Completed)) => Task::Leave,
        (_, _, Some(Outcome::Failed)) => Task::GiveBack,
        (_, _, None) => return,
    };
    next.step("source daemon: reads the report", |state| state.here.task = task);
}

fn gives_back(state: &State, next: &mut Next<'_>) {
    match state.settle {
        Call::None => {
            next.step("source daemon: gives the place back", |state| state.settle = Call::Request);
            next.step("source daemon: cannot give the place back", stays);
        }
        Call::Reply(_) => next.step("source daemon: the place was given back", stays),
        Call::Request | Call::Waiting => next.fault("source daemon: does not wait for the answer", stays),
    }
}

fn settles(state: &State, next: &mut Next<'_>) {
    if state.here.stage != Stage::Settling {
        return next.step("source daemon: stores the doubt", |state| {
            (state.here.stage, state.here.status) = (Stage::Settling, Status::InDoubt);
        });
    }
    match state.settle {
        Call::None => next.step("source daemon: asks where it runs", |state| state.settle = Call::Request),
        Call::Reply(settlement) => next.step("source daemon: hears where it runs", |state| {
            state.settle = Call::None;
            state.history.never_said |= settlement == Settlement::Never;
            state.here.task = Task::Tell(settlement);
        }),
        Call::Request | Call::Waiting => {}
    }
    if next.mutation == Some(Mutation::SilenceMeansNever) {
        next.fault("source daemon: takes silence for an answer", |state| {
            state.here.task = Task::Tell(Settlement::Never);
        });
    }
}

fn tells(settlement: Settlement, next: &mut Next<'_>) {
    match settlement {
        Settlement::Lost => next.step("source daemon: keeps what is left of a lost machine", |state| {
            (state.source.alive, state.here.status) = (false, Status::Stopped);
            (state.here.stage, state.here.task) = (Stage::Lost, Task::Idle);
        }),
        Settlement::Runs => {
            next.step("source daemon: tells that it runs there", |state| state.here.task = Task::Leave);
        }
        Settlement::Never => next.step("source daemon: tells that it runs here", |state| {
            let source = &mut state.source;
            if source.alive && source.fenced && source.outcome == Some(Outcome::InDoubt) && !source.settled {
                (source.fenced, source.paused, source.settled) = (false, false, true);
            }
            stays(state);
        }),
    }
}

fn leaves(state: &State, next: &mut Next<'_>) {
    match (state.here.stage, state.here.status) {
        (_, Status::Gone) => next.step("source daemon: stores that it has left", |state| {
            (state.here.stage, state.here.task) = (Stage::Completed, Task::Idle);
        }),
        (Stage::Verifying, Status::Deleting) => next.step("source daemon: discards what is left", |state| {
            (state.source.alive, state.source.cold) = (false, false);
            state.here.status = Status::Gone;
            state.link.close_source();
            if state.session == Session::Up {
                state.session = Session::Lost;
            }
        }),
        (Stage::Verifying, _) => {
            next.step("source daemon: stores that it is to go", |state| state.here.status = Status::Deleting);
        }
        _ => next.step("source daemon: stores that it is gone", |state| state.here.stage = Stage::Verifying),
    }
}

/// One step of the destination's daemon.
pub fn destination(state: &State, next: &mut Next<'_>) {
    let there = &state.there;
    if !there.alive {
        return next.step("destination daemon: starts again", |state| state.there.alive = true);
    }
    if state.reserve == Call::Request {
        next.step("destination daemon: is asked for a place", |state| {
            let free = state.there.stage.is_none();
            state.reserve = Call::Reply(free);
            if free {
                state.there.stage = Some(Stage::Transferring);
                let destination = &mut state.destination;
                (destination.born, destination.alive, destination.phase) = (true, true, Some(Phase::Handshake));
            }
        });
    }
    watches(state, next);
    answers(state, next);
}

/// `run_destination`.
fn watches(state: &State, next: &mut Next<'_>) {
    let (there, destination) = (&state.there, &state.destination);
    let Some(stage) = there.stage.filter(|stage| !stage.ended()) else { return };
    if there.asked && destination.alive && !destination.committed && !destination.cancelled {
        next.step("destination daemon: cancels its VMM", |state| state.destination.cancelled = true);
    }
    let early = next.mutation == Some(Mutation::CommittedCountsAsRunning);
    let running = destination.committed && (early || destination.phase > Some(Phase::Committed));
    if destination.alive && running && stage != Stage::Verifying {
        return next.step("destination daemon: it has arrived", |state| state.there.stage = Some(Stage::Verifying));
    }
    // Whoever asks has nothing more to send.
    let in_postcopy = destination.alive && destination.phase == Some(Phase::Postcopy);
    if there.asked && in_postcopy && state.session == Session::Lost {
        next.step("destination daemon: has its VMM give up the post-copy", |state| match state.destination.complete {
            true => state.destination.phase = Some(Phase::Verify),
            false => crate::engine::loses(state),
        });
    }
    // A mark is left where the machine has run, whatever became of its process.
    let marked = !destination.alive && destination.mark;
    let arrived = stage == Stage::Verifying || marked;
    // What came by post-copy and was not seen to its end counts as incomplete.
    let in_part = !destination.alive && destination.postcopy && destination.phase != Some(Phase::Verify);
    let lost = destination.arrival == Some(Arrival::Lost) || (in_part && destination.arrival.is_none());
    if !destination.alive || destination.arrival.is_some() {
        next.step("destination daemon: its VMM has ended", |state| {
            if arrived && lost {
                state.there.stage = Some(Stage::Lost);
            } else if arrived {
                state.there.stage = Some(Stage::Completed);
            } else {
                state.there.stage = Some(Stage::Failed);
                (state.destination.alive, state.destination.runs) = (false, false);
            }
        });
    }
}

/// `settle_destination`.
fn answers(state: &State, next: &mut Next<'_>) {
    // In post-copy it is not decided before all of it is here.
    let whole = matches!(state.destination.phase, Some(Phase::Verify | Phase::Ended));
    let settlement = match state.there.stage {
        Some(Stage::Completed) => Some(Settlement::Runs),
        Some(Stage::Verifying) if whole && state.destination.arrival != Some(Arrival::Lost) => Some(Settlement::Runs),
        Some(Stage::Lost) => Some(Settlement::Lost),
        Some(Stage::Failed) => Some(Settlement::Never),
        _ => None,
    };
    let hasty = next.mutation == Some(Mutation::NeverWhileUndecided);
    match (state.settle, settlement, state.there.stage) {
        (Call::Request, None, None) => next.step("destination daemon: never heard of it", |state| {
            state.there.stage = Some(Stage::Failed);
            state.settle = Call::Reply(Settlement::Never);
        }),
        (Call::Request, None, _) => next.step("destination daemon: is asked where it runs", |state| {
            state.there.asked = true;
            state.settle = if hasty { Call::Reply(Settlement::Never) } else { Call::Waiting };
        }),
        (Call::Request | Call::Waiting, Some(settlement), _) => {
            next.step("destination daemon: says where it runs", |state| state.settle = Call::Reply(settlement));
        }
        _ => {}
    }
}
