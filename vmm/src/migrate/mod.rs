//! The machine as the migration engine sees it, and the threads that migrate it.

mod destination;
mod job;
mod room;
mod source;

pub use destination::Arrival;
pub use job::{Ended, Job, JobError};
pub use source::Departure;

use std::error::Error;

use migration::guest::GuestError;

/// Hands an error with all its causes to the engine, which passes it on as text.
fn explain(error: impl Error) -> GuestError {
    GuestError::new(chain(&error))
}

/// An error and its causes in one line, outermost first. A cause that its parent repeats word for word is left out.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        cause = error.source();
    }
    text
}
