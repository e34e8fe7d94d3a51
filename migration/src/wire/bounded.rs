//! Sequences that cannot grow beyond their use while they are decoded.
//!
//! A message may have 64 MiB for the sake of device state. An element of a sequence can take one byte on the wire and fifty in
//! memory, so without a bound of its own a peer could have a gigabyte allocated before anything is checked.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// Most regions, disks, devices, state payloads, CPUID leaves or features in one message.
pub(crate) const MAX_ITEMS: usize = 1024;

/// For `#[serde(deserialize_with)]`: a sequence of at most [`MAX_ITEMS`], encoded as any other.
///
/// # Errors
///
/// If there are more, before the rest is read.
pub(crate) fn items<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_seq(Items(PhantomData))
}

struct Items<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Items<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {MAX_ITEMS} items")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<T>, A::Error> {
        // What the sender announces; refused before the first item is read.
        if let Some(announced) = sequence.size_hint().filter(|&announced| announced > MAX_ITEMS) {
            return Err(A::Error::invalid_length(announced, &self));
        }
        let mut items = Vec::new();
        while let Some(item) = sequence.next_element()? {
            if items.len() == MAX_ITEMS {
                return Err(A::Error::invalid_length(MAX_ITEMS + 1, &self));
            }
            items.push(item);
        }
        Ok(items)
    }
}

#[cfg(test)]
mod tests {
    use crate::guest::{DeviceSlot, StatePayload};
    use crate::wire::message::Message;

    #[test]
    fn a_message_of_many_tiny_items_is_refused_early() {
        let slot = DeviceSlot { name: String::new(), version: 0 };
        let payload = StatePayload { slot, bytes: Vec::new() };
        let state = |count| Message::State { payloads: vec![payload.clone(); count] }.encode().unwrap();
        assert!(Message::decode(&state(super::MAX_ITEMS)).is_ok());
        // Not even one of them has to be there.
        let announced = &state(super::MAX_ITEMS + 1)[..8];
        assert!(Message::decode(announced).is_err());
        assert!(Message::decode(&state(super::MAX_ITEMS + 1)).is_err());
    }

    #[test]
    fn it_is_encoded_as_any_other_sequence() {
        let slot = DeviceSlot { name: "a".to_owned(), version: 1 };
        let message = Message::State { payloads: vec![StatePayload { slot, bytes: vec![7] }] };
        assert_eq!(Message::decode(&message.encode().unwrap()), Ok(message));
    }
}
