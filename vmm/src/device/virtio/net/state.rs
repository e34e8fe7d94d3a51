//! Saved state of a network card.

use std::net::IpAddr;

use migration::guest::{DeviceSlot, StatePayload};
use serde::{Deserialize, Serialize};

use super::QUEUE_SIZE;
use crate::device::StateError;
use crate::device::state::decode;
use crate::device::virtio::{QueueStateV1, TransportStateV1};

/// Version of [`NetStateV2`].
pub const VERSION: u16 = 2;

/// A paused card has no frame in flight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStateV2 {
    /// Registers and queues.
    pub transport: TransportStateV1,
    /// MAC address, which must not change under a running guest.
    pub mac: [u8; 6],
    /// Addresses that the guest was seen to use.
    pub addresses: Vec<IpAddr>,
    /// Whether the guest was told that its link is up.
    pub link_up: bool,
}

/// A card without a control queue, of which only IPv4 addresses were known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStateV1 {
    /// As in [`NetStateV2`], with two queues.
    pub transport: TransportStateV1,
    /// As in [`NetStateV2`].
    pub mac: [u8; 6],
    /// IPv4 addresses.
    pub addresses: Vec<[u8; 4]>,
    /// As in [`NetStateV2`].
    pub link_up: bool,
}

impl From<NetStateV1> for NetStateV2 {
    fn from(state: NetStateV1) -> Self {
        let NetStateV1 { mut transport, mac, addresses, link_up } = state;
        transport.queues.push(QueueStateV1 { size: QUEUE_SIZE, ..QueueStateV1::default() });
        Self { transport, mac, addresses: addresses.into_iter().map(IpAddr::from).collect(), link_up }
    }
}

impl NetStateV2 {
    /// Reads a state of this version or of an earlier one.
    ///
    /// # Errors
    ///
    /// [`StateError`] if it is not one.
    pub fn read(slot: &DeviceSlot, payload: &StatePayload) -> Result<Self, StateError> {
        if payload.slot.version == 1 { Ok(decode::<NetStateV1>(slot, payload)?.into()) } else { decode(slot, payload) }
    }
}
