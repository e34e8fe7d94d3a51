//! Who owns the machine after a migration, and is that the truth?

use super::{FakeMachine, World};
use crate::destination::{DestinationError, Received};
use crate::guest::SourceGuest;
use crate::report::{Outcome, Report};

/// Where the machine runs in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// It never left.
    Source,
    /// It moved.
    Destination,
    /// The source could not know, the destination said that it does not run it, and it was taken back.
    TakenBack,
}

/// Checks that what both ends say fits together and fits what the world has seen; settles what is in doubt as two daemons
/// would; checks memory and disks of the machine where it runs. It is stopped afterwards.
///
/// # Errors
///
/// The first thing that does not fit, in words.
pub fn settle(
    world: &World,
    source: &FakeMachine,
    destination: &FakeMachine,
    report: &Report,
    received: &Result<Received, DestinationError>,
) -> Result<Owner, String> {
    let running = world.running();
    let fail = |text: &str| {
        Err(format!("{text}: {:?} ({}), {received:?}, runs on {running:?}", report.outcome, report.reason))
    };
    let owner = match (report.outcome, received.is_ok()) {
        (Outcome::Completed, true) => Owner::Destination,
        (Outcome::Completed, false) => return fail("the source thinks it moved, the destination does not"),
        (Outcome::Failed | Outcome::Cancelled, false) => Owner::Source,
        (Outcome::Failed | Outcome::Cancelled, true) => return fail("both ends think they have it"),
        (Outcome::InDoubt, true) => Owner::Destination,
        (Outcome::InDoubt, false) => Owner::TakenBack,
    };
    match owner {
        Owner::Source if running != ["a"] || source.is_fenced() => return fail("it does not run at the source"),
        Owner::Destination if running != ["b"] || !source.is_fenced() => {
            return fail("it does not run at the destination alone");
        }
        Owner::TakenBack => {
            if !running.is_empty() || !source.is_fenced() {
                return fail("in doubt, but not fenced");
            }
            let again = source.unfence().and_then(|()| SourceGuest::resume(source));
            again.map_err(|error| format!("it cannot be taken back: {error}"))?;
        }
        _ => {}
    }
    if owner != Owner::Destination && !destination.is_discarded() {
        return fail("the half-built machine was not discarded");
    }
    if source.memory.is_tracking() || source.disks.iter().any(|disk| disk.is_tracking()) {
        return fail("the source still tracks");
    }
    if source.throttle_percent().0 > 0 || destination.throttle_percent().1 > 0 {
        return fail("a vCPU is still throttled");
    }
    match owner {
        Owner::Destination => destination.check()?,
        _ => source.check()?,
    }
    match world.violations().first() {
        Some(violation) => fail(violation),
        None => Ok(owner),
    }
}
