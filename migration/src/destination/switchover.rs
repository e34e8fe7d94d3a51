//! Switchover and Commit at the destination.

use std::time::{Duration, Instant};

use super::context::{Context, by_peer};
use super::link::{Failed, Link};
use super::postcopy::Postcopy;
use super::supervise::Supervised;
use super::verify::Verify;
use crate::error::{Doing, MigrationError};
use crate::guest::{MachineLayout, StatePayload};
use crate::wire::WireError;
use crate::wire::message::Message;

/// The state has arrived; the source's guest is stopped.
pub(super) struct Switchover {
    link: Link,
    layout: MachineLayout,
    payloads: Vec<StatePayload>,
}

/// Commit has arrived: the machine belongs to this end.
pub(super) struct Committed {
    link: Link,
    layout: MachineLayout,
    since: Instant,
}

/// What follows once the machine runs.
pub(super) enum Next {
    /// Parts of it come now.
    Postcopy(Box<Postcopy>),
    Verify(Box<Verify>),
}

impl Switchover {
    pub(super) fn new(link: Link, layout: MachineLayout, payloads: Vec<StatePayload>) -> Self {
        Self { link, layout, payloads }
    }

    pub(super) fn run(mut self, context: &mut Context) -> Result<Committed, Box<Failed>> {
        match self.prepare(context) {
            Ok(since) => Ok(Committed { link: self.link, layout: self.layout, since }),
            Err(error) => {
                let cancelled = context.control.is_cancelled();
                let error = if cancelled { MigrationError::Cancelled } else { self.link.cause(error) };
                Err(Failed::new(error, Some(self.link)))
            }
        }
    }

    /// Everything is here and restored; says so and waits for Commit.
    fn prepare(&mut self, context: &Context) -> Result<Instant, MigrationError> {
        self.link.wait_complete()?;
        self.check_payloads()?;
        if let Some((awaited, door)) = self.link.awaited.take().zip(self.link.door.take()) {
            self.link.supervised = Some(awaited.start(context, &self.layout, self.link.streams, door)?);
        }
        let start = Instant::now();
        context.guest.restore_state(&self.payloads).doing("restoring the state of the devices")?;
        let restore_us = start.elapsed().as_micros() as u64;
        if let Some(error) = self.link.supervised.as_ref().and_then(Supervised::failed) {
            return Err(error);
        }
        if context.control.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        self.link.control.send(&Message::Prepared { restore_us })?;
        match self.link.control.receive("waiting for Commit").map_err(by_peer)? {
            Message::Commit => Ok(Instant::now()),
            other => Err(WireError::Unexpected { found: other.name(), expected: "Commit" }.into()),
        }
    }

    /// Exactly the devices that the layout announced, each once.
    fn check_payloads(&self) -> Result<(), MigrationError> {
        let wrong = |detail: String| Err(WireError::Malformed { kind: "state", detail }.into());
        for slot in &self.layout.devices {
            match self.payloads.iter().filter(|payload| payload.slot.name == slot.name).count() {
                1 => {}
                count => return wrong(format!("{count} payloads for `{}`, which needs one", slot.name)),
            }
        }
        match self.payloads.iter().find(|payload| !self.layout.devices.contains(&payload.slot)) {
            Some(payload) => {
                let slot = &payload.slot;
                wrong(format!("`{}` in version {} was not announced in the layout", slot.name, slot.version))
            }
            None => Ok(()),
        }
    }
}

impl Committed {
    /// Runs the machine: the only place where that happens.
    pub(super) fn run(mut self, context: &mut Context) -> Result<Next, Box<Failed>> {
        if !context.control.commit() {
            // Cancelled here at the very last moment: the source is told that it did not run, and takes it back.
            return Err(Failed::new(MigrationError::Cancelled, Some(self.link)));
        }
        let sound = self.link.supervised.as_ref().map_or(Ok(()), Supervised::commit);
        if let Err(error) = sound {
            context.control.uncommit();
            return Err(Failed::new(error, Some(self.link)));
        }
        if let Err(error) = context.guest.resume().doing("starting the machine") {
            context.control.uncommit();
            return Err(Failed::new(error, Some(self.link)));
        }
        let resume: Duration = self.since.elapsed();
        let told = self.link.control.send(&Message::Resumed { resume_us: resume.as_micros() as u64 });
        tracing::info!(resume_us = resume.as_micros() as u64, "the machine runs here");
        if let Some(supervised) = self.link.supervised.take() {
            // If the answer was lost, the source comes back over the fault channel.
            let phase = Postcopy::new(self.link, supervised, self.layout, resume);
            return Ok(Next::Postcopy(Box::new(phase)));
        }
        let warning =
            told.err().map(|error| format!("the source could not be told that the machine runs here: {error}"));
        Ok(Next::Verify(Box::new(Verify::new(self.link, self.layout, resume, warning))))
    }
}
