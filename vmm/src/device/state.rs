//! Saved states of devices: each is a plain structure with a version in its name, encoded by postcard.

use migration::guest::{DeviceSlot, StatePayload};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A saved state cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The payload belongs to something else.
    #[error(
        "saved state is of {found}, but {expected} was to be restored: both hosts must list the same devices in the same order"
    )]
    Slot {
        /// Which device was to be restored.
        expected: String,
        /// What the payload says.
        found: String,
    },
    /// Written by a version that this build does not know.
    #[error("{device}: saved state has version {found}, this build knows up to {known}: update this host")]
    Version {
        /// Which device.
        device: String,
        /// What the payload says.
        found: u16,
        /// The newest that is understood here.
        known: u16,
    },
    /// Damaged.
    #[error("{device}: saved state cannot be decoded: it was damaged, or written by another program")]
    Decode {
        /// Which device.
        device: String,
        /// How the decoding ended.
        #[source]
        source: postcard::Error,
    },
    /// Decoded, but impossible on this device.
    #[error("{device}: saved state does not fit: {what}")]
    Unfit {
        /// Which device.
        device: String,
        /// What does not fit, with values.
        what: String,
    },
}

/// Encodes `state` as the payload of `slot`.
///
/// # Errors
///
/// [`StateError::Decode`] if a field cannot be encoded; our own states always can.
pub fn encode<S: Serialize>(slot: DeviceSlot, state: &S) -> Result<StatePayload, StateError> {
    let bytes =
        postcard::to_stdvec(state).map_err(|source| StateError::Decode { device: slot.name.clone(), source })?;
    Ok(StatePayload { slot, bytes })
}

/// Decodes the payload of `slot`, after checking that it is one, and that no byte is left over.
///
/// # Errors
///
/// [`StateError`] for a payload of another device, of an unknown version, or damaged.
pub fn decode<S: DeserializeOwned>(slot: &DeviceSlot, payload: &StatePayload) -> Result<S, StateError> {
    if payload.slot.name != slot.name {
        return Err(StateError::Slot { expected: slot.name.clone(), found: payload.slot.name.clone() });
    }
    let device = || slot.name.clone();
    if payload.slot.version == 0 || payload.slot.version > slot.version {
        return Err(StateError::Version { device: device(), found: payload.slot.version, known: slot.version });
    }
    let (state, rest) =
        postcard::take_from_bytes(&payload.bytes).map_err(|source| StateError::Decode { device: device(), source })?;
    if rest.is_empty() {
        Ok(state)
    } else {
        Err(StateError::Decode { device: device(), source: postcard::Error::DeserializeBadEncoding })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(name: &str, version: u16) -> DeviceSlot {
        DeviceSlot { name: name.into(), version }
    }

    #[test]
    fn refuses_what_is_not_its_own() {
        let payload = encode(slot("virtio-net/net0", 1), &(7u32, true)).unwrap();
        assert_eq!(decode::<(u32, bool)>(&slot("virtio-net/net0", 1), &payload).unwrap(), (7, true));
        assert!(matches!(decode::<(u32, bool)>(&slot("virtio-net/net1", 1), &payload), Err(StateError::Slot { .. })));
        let newer = StatePayload { slot: slot("virtio-net/net0", 2), ..payload.clone() };
        assert!(matches!(
            decode::<(u32, bool)>(&slot("virtio-net/net0", 1), &newer),
            Err(StateError::Version { found: 2, known: 1, .. })
        ));
        let mut longer = payload.clone();
        longer.bytes.push(0);
        assert!(matches!(decode::<(u32, bool)>(&slot("virtio-net/net0", 1), &longer), Err(StateError::Decode { .. })));
        let cut = StatePayload { bytes: payload.bytes[..1].to_vec(), ..payload };
        assert!(matches!(decode::<(u32, bool)>(&slot("virtio-net/net0", 1), &cut), Err(StateError::Decode { .. })));
    }
}
