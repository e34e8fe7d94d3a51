//! Opening channels: each its own TCP connection and TLS session.

use std::time::Duration;

use super::context::{Context, by_peer};
use super::link::PATIENCE;
use crate::error::MigrationError;
use crate::transport::channels::Channel;
use crate::transport::stream::TlsStream;
use crate::transport::tcp;
use crate::transport::tls::Connector;
use crate::wire::handshake::{Role, Welcome};

/// For a TCP connection, and for a TLS handshake on it.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// For a data channel to move. Much longer: an acknowledgement waits for a flush of the destination's disks, and whether
/// the destination lives is known from the control channel.
const DATA_PATIENCE: Duration = Duration::from_secs(120);
/// Channels that are opened at the same time: a destination lets at most eight wait.
const OPENED_AT_ONCE: usize = 4;

pub(super) fn open(context: &Context, connector: &Connector, role: Role) -> Result<(Channel, Welcome), MigrationError> {
    context.check_cancelled()?;
    let options = &context.options;
    let tcp = tcp::connect(options.address, HANDSHAKE_TIMEOUT)?;
    let stream = TlsStream::handshake(connector.session()?, tcp, context.stop.clone(), HANDSHAKE_TIMEOUT)?;
    let (mut channel, welcome) = Channel::introduce(stream, &options.token, &options.id, role).map_err(by_peer)?;
    channel.set_patience(if role == Role::Control { PATIENCE } else { DATA_PATIENCE });
    Ok((channel, welcome))
}

/// The data channels of a session, the one for disks last.
pub(super) fn data_roles(streams: u16, has_disks: bool) -> Vec<Role> {
    (0..streams).map(Role::Memory).chain(has_disks.then_some(Role::Disk)).collect()
}

/// Opens several channels, in the order of `roles`; a few at a time, since each waits for three round trips.
pub(super) fn open_all(
    context: &Context,
    connector: &Connector,
    roles: &[Role],
) -> Result<Vec<(Channel, Welcome)>, MigrationError> {
    let mut channels = Vec::with_capacity(roles.len());
    for few in roles.chunks(OPENED_AT_ONCE) {
        let opened: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = few.iter().map(|&role| scope.spawn(move || open(context, connector, role))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(Err(MigrationError::Bug("handshake")))).collect()
        });
        for result in opened {
            channels.push(result?);
        }
    }
    Ok(channels)
}
