//! Handshake: control channel, layout, data channels, Ready.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::context::{Context, Sent, by_peer};
use super::dial::{data_roles, open, open_all};
use super::link::{Failed, Link, PATIENCE, ping, told_by};
use super::precopy::Precopy;
use super::round::{everything, start_tracking};
use super::workers::Workers;
use crate::error::{Doing, MigrationError};
use crate::guest::MachineLayout;
use crate::page::delta::Copies;
use crate::page::{Digests, SharedBitmap, zero_block};
use crate::policy::{Limits, MigrationMode};
use crate::transport::channels::Channel;
use crate::transport::tls::Connector;
use crate::wire::WireError;
use crate::wire::handshake::{Role, Welcome};
use crate::wire::message::Message;
use crate::wire::version;

/// For the destination to build the machine.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);
/// Round trips measured before the first round: at most so many, and none after this time. What they are to leave out is an end that
/// happened to be busy, and that matters less the longer the way is.
const PINGS: u64 = 4;
const PINGS_TIME: Duration = Duration::from_millis(5);

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
    // What takes time here is done while the destination builds the machine.
    start_tracking(context)?;

    let has_disks = !layout.disks.is_empty();
    let mut data = told_by(channel, open_all(context, &connector, &data_roles(streams, has_disks)))?;
    let disk = if has_disks { data.pop() } else { None };
    let data = data.into_iter().map(|(channel, _)| channel).collect();
    let first = everything(context, &layout)?;
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
    Ok(Precopy::new(link, sent, first))
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

fn expect_ready(control: &mut Channel) -> Result<(), MigrationError> {
    match control.receive("waiting for the destination to build the machine").map_err(by_peer)? {
        Message::Ready => Ok(()),
        other => Err(WireError::Unexpected { found: other.name(), expected: "Ready" }.into()),
    }
}

/// The shortest of a few round trips on the control channel.
fn measure(control: &mut Channel) -> Result<Duration, MigrationError> {
    let start = Instant::now();
    let mut best = ping(control, 0)?;
    for nonce in 1..PINGS {
        if start.elapsed() > PINGS_TIME {
            break;
        }
        best = best.min(ping(control, nonce)?);
    }
    Ok(best)
}

/// Nothing was sent yet: the destination's memory reads as zeroes, and so do its disks once holes have been punched.
fn sent(layout: MachineLayout) -> Sent {
    let held = Arc::new(SharedBitmap::new(layout.pages()));
    let copies = Arc::new(Copies::new(layout.pages()));
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
    Sent { layout, held, copies, skipped, disks }
}
