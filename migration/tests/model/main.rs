//! Every interleaving of the protocol that decides where the machine runs: both engines, both daemons, a network that loses, and
//! processes that die at any moment. Breadth first, so that what is found is as short as it can be.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod daemon;
mod engine;
mod explore;
mod faults;
mod rules;
mod state;

use migration::control::Phase;

use explore::{Explored, explore};
use rules::Mutation;

/// So many states at least: a model that has lost a party, a message or a fault has fewer.
const LEAST_STATES: usize = 500_000;

#[test]
fn one_machine_always() {
    let Explored { states, steps, phases, found } = explore(None);
    if let Some(found) = found {
        panic!("{found}");
    }
    println!("{states} states, {steps} steps");
    assert!(states >= LEAST_STATES, "the model has shrunk to {states} states");
    // Each phase that the code has is met at both ends, so that a new one cannot go unexplored.
    for phase in Phase::ALL {
        assert!(phases.contains(&(true, phase)), "the source is never in {phase:?}");
        assert!(phases.contains(&(false, phase)), "the destination is never in {phase:?}");
    }
}

#[test]
fn every_known_mistake_is_found() {
    let mistakes = [
        (Mutation::SourceResumesOnLossAfterCommit, "nobody said that the destination never did"),
        (Mutation::DestinationRunsBeforeCommit, "without Commit"),
        (Mutation::DestinationRunsOnLossAfterPrepared, "without Commit"),
        (Mutation::NeverWhileUndecided, "runs twice"),
        (Mutation::SilenceMeansNever, "runs"),
        (Mutation::CommittedCountsAsRunning, "nowhere for good"),
        (Mutation::NoMark, "already gone on at the destination"),
        (Mutation::SourceGivesUpWhileTheDestinationWaits, "nowhere for good"),
        (Mutation::StoppedWhileInDoubt, "runs"),
        (Mutation::UnansweredSendIsForgotten, "runs"),
    ];
    for (mutation, expected) in mistakes {
        let found = explore(Some(mutation)).found.unwrap_or_else(|| panic!("{mutation:?} was not found"));
        println!("{mutation:?}: {found}");
        assert!(found.contains(expected), "{mutation:?}: {found}");
    }
}
