//! What must hold in every state, known ways to break it, and the steps out of a state.

use crate::state::{Stage, State};

/// Mistakes that were made, or could have been: the model has to find each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    SourceResumesOnLossAfterCommit,
    DestinationRunsBeforeCommit,
    DestinationRunsOnLossAfterPrepared,
    /// The destination's daemon says `never` while its VMM may still commit.
    NeverWhileUndecided,
    /// The source's daemon takes silence for `never`.
    SilenceMeansNever,
    /// A VMM that has taken the decision, and may still fail to start, is reported as running.
    CommittedCountsAsRunning,
    /// Nothing tells after a crash of the destination's VMM that the machine had run in it.
    NoMark,
    /// A post-copy whose link is lost is given up while the destination still waits for its pages.
    SourceGivesUpWhileTheDestinationWaits,
    /// A machine whose VMM ended while it was moved counts as stopped, so that an operator can start it.
    StoppedWhileInDoubt,
    /// A VMM that was told to send, and whose answer was lost, is not followed.
    UnansweredSendIsForgotten,
}

/// One way out of a state.
pub struct Step {
    pub name: &'static str,
    /// Happens to the parties, instead of being done by one.
    pub fault: bool,
    pub state: State,
}

/// Collects the ways out of a state.
pub struct Next<'a> {
    pub mutation: Option<Mutation>,
    pub from: &'a State,
    pub steps: Vec<Step>,
}

impl Next<'_> {
    /// What a party does.
    pub fn step(&mut self, name: &'static str, change: impl FnOnce(&mut State)) {
        self.add(name, false, change);
    }

    /// What happens to it.
    pub fn fault(&mut self, name: &'static str, change: impl FnOnce(&mut State)) {
        self.add(name, true, change);
    }

    fn add(&mut self, name: &'static str, fault: bool, change: impl FnOnce(&mut State)) {
        let mut state = *self.from;
        change(&mut state);
        self.steps.push(Step { name, fault, state });
    }
}

/// The first rule that the state breaks.
pub fn broken(state: &State) -> Option<&'static str> {
    let (here, there) = (state.source.runs(), state.destination.runs);
    if here && there {
        return Some("the machine runs twice");
    }
    if here && state.history.commit_sent && !state.history.never_said {
        return Some("the source runs after Commit, and nobody said that the destination never did");
    }
    if here && state.history.ran_there {
        return Some("the source runs what has already gone on at the destination");
    }
    if there && !state.history.commit_sent {
        return Some("the destination runs without Commit");
    }
    None
}

/// Both daemons are done, and know it.
pub fn is_over(state: &State) -> bool {
    let quiet = state.here.alive && state.there.alive && state.here.stage.ended();
    quiet && state.there.stage.is_none_or(Stage::ended)
}

/// Over, and exactly one machine runs, where both daemons think that it does.
pub fn is_good(state: &State) -> bool {
    let owner = match state.here.stage {
        Stage::Completed => {
            !state.source.runs() && state.destination.runs && state.there.stage == Some(Stage::Completed)
        }
        Stage::Failed => state.source.runs() && !state.destination.runs && state.there.stage != Some(Stage::Completed),
        _ => false,
    };
    is_over(state) && owner
}

/// Whether nothing has happened after which the machine may be lost: its process died with it, or its operator gave it up.
pub fn must_survive(state: &State) -> bool {
    let history = &state.history;
    let whole = !state.destination.postcopy || state.destination.complete;
    !history.lost_there && (!history.source_crashed || (history.ran_there && whole))
}
