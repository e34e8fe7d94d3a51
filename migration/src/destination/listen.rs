//! Handshake: the control channel, the layout, the data channels; and the machine is built.

use std::net::TcpListener;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::context::Context;
use super::door::{Door, Newcomer, OpenDoor, open_door, refuse};
use super::link::{Failed, Link};
use super::precopy::Precopy;
use crate::error::{Doing, MigrationError};
use crate::guest::MachineLayout;
use crate::transport::channels::Channel;
use crate::transport::tcp::TICK;
use crate::wire::handshake::{Role, Welcome};
use crate::wire::message::Message;
use crate::wire::version::POSTCOPY;
use crate::wire::{WireError, layout};

/// For all data channels to be connected after the layout has arrived.
const CHANNELS_TIMEOUT: Duration = Duration::from_secs(15);
pub(super) fn listen(context: &mut Context, listener: TcpListener) -> Result<Precopy, Box<Failed>> {
    let (door, open) = open_door(context, listener).map_err(|error| Failed::new(error, None))?;
    let deadline = Instant::now() + context.options.deadline;
    let newcomer = first(context, &open.newcomers, deadline, &door).map_err(|error| Failed::new(error, None))?;
    attach(context, newcomer, open)
}

/// Waits for the control channel.
fn first(
    context: &Context,
    newcomers: &Receiver<Newcomer>,
    deadline: Instant,
    door: &Door,
) -> Result<Newcomer, MigrationError> {
    loop {
        if context.control.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        match newcomers.recv_timeout(left.min(TICK)) {
            Ok(newcomer) if newcomer.channel.role() == Role::Control => return Ok(newcomer),
            Ok(newcomer) => refuse(newcomer.channel, "the control channel has to come first"),
            Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                return Err(MigrationError::NobodyCame { after: context.options.deadline, last: door.last_refusal() });
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(MigrationError::Bug("listener")),
        }
    }
}

/// Welcomes the control channel, learns the layout, gathers the data channels, builds the machine.
fn attach(context: &mut Context, newcomer: Newcomer, door: OpenDoor) -> Result<Precopy, Box<Failed>> {
    let Newcomer { channel, welcome } = newcomer;
    let mut link = match Link::new(channel, context) {
        Ok(link) => link,
        Err(error) => return Err(Failed::new(error, None)),
    };
    let postcopy = welcome.features.iter().any(|name| name == POSTCOPY);
    match agree_on_machine(context, &mut link, welcome, &door.newcomers) {
        Ok(layout) => {
            link.door = postcopy.then_some(door);
            Ok(Precopy::new(link, layout))
        }
        Err(error) => Err(Failed::new(error, Some(link))),
    }
}

fn agree_on_machine(
    context: &mut Context,
    link: &mut Link,
    welcome: Welcome,
    newcomers: &Receiver<Newcomer>,
) -> Result<MachineLayout, MigrationError> {
    link.control.send(&Message::Welcome(welcome))?;
    let (layout, streams) = match link.control.receive("waiting for the machine's layout")? {
        Message::Layout { layout, streams } => (layout, streams),
        other => return Err(WireError::Unexpected { found: other.name(), expected: "Layout" }.into()),
    };
    layout::check(&layout, streams)?;
    link.streams = streams;
    // The machine is built while channels come; each takes some milliseconds.
    let (built, channels) = std::thread::scope(|scope| {
        let guest = &context.guest;
        let build = scope.spawn(|| guest.prepare(&layout).doing("building the machine"));
        let channels = gather(context, newcomers, streams, !layout.disks.is_empty());
        (build.join().unwrap_or(Err(MigrationError::Bug("building the machine"))), channels)
    });
    built?;
    let channels = channels?;
    link.start(context, &layout, channels)?;
    link.control.send(&Message::Ready)?;
    tracing::info!(machine = %layout.machine, pages = layout.pages(), disks = layout.disks.len(), streams, "ready to receive");
    Ok(layout)
}

/// Waits for all data channels; a second one in the same role is refused, and the first one stays.
fn gather(
    context: &Context,
    newcomers: &Receiver<Newcomer>,
    streams: u16,
    disk: bool,
) -> Result<Vec<Channel>, MigrationError> {
    let expected = usize::from(streams) + usize::from(disk);
    let deadline = Instant::now() + CHANNELS_TIMEOUT.min(context.options.deadline);
    let mut channels: Vec<Channel> = Vec::new();
    while channels.len() < expected {
        if context.control.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let Newcomer { mut channel, welcome } = match newcomers.recv_timeout(left.min(TICK)) {
            Ok(newcomer) => newcomer,
            Err(RecvTimeoutError::Timeout) if !left.is_zero() => continue,
            Err(_) => {
                let after = CHANNELS_TIMEOUT.min(context.options.deadline);
                return Err(MigrationError::ChannelsMissing { attached: channels.len(), expected, after });
            }
        };
        let role = channel.role();
        let wanted = match role {
            Role::Control => false,
            Role::Memory(number) => number < streams,
            Role::Disk => disk,
            Role::Fault => false,
        };
        if !wanted {
            refuse(channel, &format!("no {role} channel was announced"));
        } else if channels.iter().any(|known| known.role() == role) {
            refuse(channel, &format!("there is a {role} channel already"));
        } else if let Err(error) = channel.send(&Message::Welcome(welcome)) {
            tracing::warn!(%role, %error, "a channel was lost before it was welcomed");
        } else {
            channels.push(channel);
        }
    }
    Ok(channels)
}
