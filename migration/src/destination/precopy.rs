//! Pre-copy at the destination: the source is answered on the control channel until the state arrives.

use super::context::{Context, by_peer};
use super::link::{Failed, Link};
use super::supervise::Awaited;
use super::switchover::Switchover;
use super::verify;
use crate::error::MigrationError;
use crate::guest::MachineLayout;
use crate::transport::channels::Incoming;
use crate::wire::WireError;
use crate::wire::message::Message;

/// Data can arrive.
pub(super) struct Precopy {
    link: Link,
    layout: MachineLayout,
}

impl Precopy {
    pub(super) fn new(link: Link, layout: MachineLayout) -> Self {
        Self { link, layout }
    }

    /// Answers the source until the state arrives.
    pub(super) fn run(mut self, context: &mut Context) -> Result<Switchover, Box<Failed>> {
        loop {
            match self.link.control.next("waiting for the source") {
                Ok(Incoming::Message(Message::State { payloads })) => {
                    self.link.hurry();
                    return Ok(Switchover::new(self.link, self.layout, payloads));
                }
                Ok(Incoming::Message(message)) => {
                    if let Err(error) = self.answer(context, &message) {
                        return Err(Failed::new(error, Some(self.link)));
                    }
                }
                Ok(other) => {
                    let error = WireError::Unexpected { found: other.name(), expected: "State" };
                    return Err(Failed::new(error, Some(self.link)));
                }
                Err(error) => {
                    let error = if context.control.is_cancelled() { MigrationError::Cancelled } else { by_peer(error) };
                    let error = self.link.cause(error);
                    return Err(Failed::new(error, Some(self.link)));
                }
            }
        }
    }

    fn answer(&mut self, context: &Context, message: &Message) -> Result<(), MigrationError> {
        match message {
            Message::Ping { nonce } => {
                let sent = self.link.control.send(&Message::Pong { nonce: *nonce });
                sent.map_err(|error| self.link.cause(error))
            }
            Message::CompareFull => {
                self.link.wait_complete()?;
                let difference = verify::compare_images(context, &mut self.link, &self.layout)?;
                self.link.control.send(&Message::Compared { difference: difference.clone() })?;
                match difference {
                    Some(difference) => Err(MigrationError::Different { difference }),
                    None => Ok(()),
                }
            }
            Message::PostcopyPrepare if self.link.door.is_some() && self.link.awaited.is_none() => {
                self.link.awaited = Some(Awaited::new(&self.layout));
                Ok(())
            }
            Message::Missing { .. } | Message::MissingEnd { .. } => self.missing(context, message),
            other => Err(WireError::Unexpected { found: other.name(), expected: "State" }.into()),
        }
    }

    fn missing(&mut self, context: &Context, message: &Message) -> Result<(), MigrationError> {
        let (Some(awaited), Some(door)) = (&mut self.link.awaited, &self.link.door) else {
            return Err(WireError::Unexpected { found: message.name(), expected: "State" }.into());
        };
        if awaited.take(context, message)? && !awaited.is_attached() {
            awaited.attach(context, door, self.link.streams)?;
            self.link.control.send(&Message::PostcopyReady)?;
        }
        Ok(())
    }
}
