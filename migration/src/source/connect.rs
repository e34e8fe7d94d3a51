//! Handshake: control channel, layout, data channels, Ready.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::precopy::Precopy;
use super::workers::Workers;
use super::{Context, Failed, Link, Sent};
use crate::error::{Doing, MigrationError};
use crate::guest::MachineLayout;
use crate::page::{Digests, SharedBitmap, zero_block};
use crate::policy::{Limits, MigrationMode};
use crate::transport::TransportError;
use crate::transport::channels::Channel;
use crate::transport::stream::TlsStream;
use crate::transport::tcp;
use crate::transport::tls::Connector;
use crate::wire::WireError;
use crate::wire::handshake::{Role, Welcome};
use crate::wire::message::Message;
use crate::wire::version;

/// For a TCP connection, and for a TLS handshake on it.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// For the destination to build the machine.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);
/// For any other answer on the control channel.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);
/// For a data channel to move. Much longer: an acknowledgement waits for a flush of the destination's disks, and whether
/// the destination lives is known from the control channel.
const DATA_PATIENCE: Duration = Duration::from_secs(120);
/// For a destination that broke its data channels to say why.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Round trips measured before the first round.
const PINGS: u64 = 4;

pub(super) fn connect(context: &mut Context) -> Result<Precopy, Box<Failed>> {
    let mut connector = None;
    let mut control = None;
    match handshake(context, &mut connector, &mut control) {
        Ok(phase) => Ok(phase),
        Err(error) => {
            if let Some(mut channel) = control.take() {
                if !matches!(error, MigrationError::Peer { .. }) {
                    Channel::abort(&mut channel, &error.chain());
                }
                channel.linger(Duration::from_millis(200));
            }
            Err(Failed::new(error, None))
        }
    }
}

fn handshake(
    context: &mut Context,
    connector: &mut Option<Connector>,
    control: &mut Option<Channel>,
) -> Result<Precopy, MigrationError> {
    context.check_cancelled()?;
    check(&context.options.limits)?;
    let layout = context.guest.layout().doing("asking for the machine's layout")?;
    context.report.machine.clone_from(&layout.machine);
    context.report.memory.pages_total = layout.pages();
    let connector =
        connector.insert(Connector::new(&context.options.identity, &context.options.destination_host)?).clone();
    let (channel, welcome) = open(context, &connector, Role::Control)?;
    context.report.tls = channel.info();
    let channel = control.insert(channel);
    if context.options.limits.compare_full && !welcome.features.iter().any(|name| name == version::COMPARE_FULL) {
        let missing = "the destination's release cannot compare full images; leave `compare_full` out";
        return Err(MigrationError::Options(missing.to_owned()));
    }
    agree_on_mode(&mut context.options.limits, &welcome)?;
    let streams = context.options.limits.streams;
    channel.send(&Message::Layout { layout: layout.clone(), streams })?;

    let mut data = Vec::new();
    for number in 0..streams {
        data.push(told_by(channel, open(context, &connector, Role::Memory(number)))?.0);
    }
    let disk = match layout.disks.len() {
        0 => None,
        _ => Some(told_by(channel, open(context, &connector, Role::Disk))?.0),
    };
    channel.set_patience(PREPARE_TIMEOUT);
    expect_ready(channel)?;
    channel.set_patience(PATIENCE);
    let round_trip = measure(channel)?;
    tracing::info!(machine = %layout.machine, streams, ?round_trip, cipher = %context.report.tls.cipher, "destination is ready");

    let sent = sent(layout);
    let workers = Workers::start(context, &sent, data, disk)?;
    let control = control.take().ok_or(MigrationError::Bug("control channel"))?;
    let heard = Instant::now();
    let link = Link { control, workers, round_trip, heard, features: welcome.features, postcopy: None };
    Ok(Precopy::new(link, sent))
}

/// Post-copy needs both ends; a comparison of both stopped machines needs all of it at both.
fn agree_on_mode(limits: &mut Limits, welcome: &Welcome) -> Result<(), MigrationError> {
    let refused = if limits.compare_full {
        Some(
            "full images cannot be compared in post-copy, where the destination never holds one: leave one of the two out",
        )
    } else if welcome.features.iter().any(|name| name == version::POSTCOPY) {
        None
    } else {
        Some("the destination does not offer post-copy; its log says why: allow pre-copy, or mend that")
    };
    match (refused, limits.mode) {
        (Some(text), MigrationMode::Postcopy) => Err(MigrationError::Options(text.to_owned())),
        (Some(text), MigrationMode::Hybrid) => {
            tracing::info!(why = text, "pre-copy only");
            limits.mode = MigrationMode::Precopy;
            Ok(())
        }
        _ => Ok(()),
    }
}

fn check(limits: &Limits) -> Result<(), MigrationError> {
    if !(1..=Limits::MAX_STREAMS).contains(&limits.streams) {
        let text = format!("{} memory channels asked for; 1 to {} are possible", limits.streams, Limits::MAX_STREAMS);
        return Err(MigrationError::Options(text));
    }
    Ok(())
}

pub(super) fn open(context: &Context, connector: &Connector, role: Role) -> Result<(Channel, Welcome), MigrationError> {
    context.check_cancelled()?;
    let options = &context.options;
    let tcp = tcp::connect(options.address, HANDSHAKE_TIMEOUT)?;
    let stream = TlsStream::handshake(connector.session()?, tcp, context.stop.clone(), HANDSHAKE_TIMEOUT)?;
    let (mut channel, welcome) = Channel::introduce(stream, &options.token, &options.id, role).map_err(by_peer)?;
    channel.set_patience(if role == Role::Control { PATIENCE } else { DATA_PATIENCE });
    Ok((channel, welcome))
}

/// If a data channel fails because the destination has given up, it says why on the control channel.
pub(super) fn told_by<T>(control: &mut Channel, result: Result<T, MigrationError>) -> Result<T, MigrationError> {
    match result {
        Err(MigrationError::Transport(error)) if error.is_link() => Err(reason_of(control, error.into())),
        other => other,
    }
}

/// The destination's own reason, if it has given up and said so; else `otherwise`.
pub(super) fn reason_of(control: &mut Channel, otherwise: MigrationError) -> MigrationError {
    control.set_deadline(Some(Instant::now() + LAST_WORDS));
    loop {
        match control.receive("asking what happened") {
            Err(error @ TransportError::Aborted { .. }) => return by_peer(error),
            Err(_) => return otherwise,
            Ok(_) => {}
        }
    }
}

/// Turns the peer's own words into an error of their own kind.
pub(super) fn by_peer(error: TransportError) -> MigrationError {
    match error {
        TransportError::Aborted { reason } => MigrationError::Peer { peer: "destination", reason },
        other => other.into(),
    }
}

fn expect_ready(control: &mut Channel) -> Result<(), MigrationError> {
    match control.receive("waiting for the destination to build the machine").map_err(by_peer)? {
        Message::Ready => Ok(()),
        other => Err(WireError::Unexpected { found: other.name(), expected: "Ready" }.into()),
    }
}

/// The shortest of a few round trips on the control channel.
fn measure(control: &mut Channel) -> Result<Duration, MigrationError> {
    let mut best = Duration::MAX;
    for nonce in 0..PINGS {
        best = best.min(ping(control, nonce)?);
    }
    Ok(best)
}

/// One round trip; also shows the destination that this end is alive.
pub(super) fn ping(control: &mut Channel, nonce: u64) -> Result<Duration, MigrationError> {
    let start = Instant::now();
    control.send(&Message::Ping { nonce }).map_err(by_peer)?;
    match control.receive("waiting for an answer of the destination").map_err(by_peer)? {
        Message::Pong { nonce: answer } if answer == nonce => Ok(start.elapsed()),
        other => Err(WireError::Unexpected { found: other.name(), expected: "Pong" }.into()),
    }
}

/// Nothing was sent yet: the destination's memory reads as zeroes, and so do its disks once holes have been punched.
fn sent(layout: MachineLayout) -> Sent {
    let held = Arc::new(SharedBitmap::new(layout.pages()));
    let skipped = Arc::new(SharedBitmap::new(layout.pages()));
    let disks = layout
        .disks
        .iter()
        .map(|disk| {
            let digests = Digests::new(disk.blocks(), zero_block(crate::guest::BLOCK_BYTES));
            if let Some(last) = disk.blocks().checked_sub(1) {
                digests.set(last, zero_block(disk.block_bytes(last)));
            }
            Arc::new(digests)
        })
        .collect();
    Sent { layout, held, skipped, disks }
}
