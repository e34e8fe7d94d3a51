//! What a guest tells of its memory (virtio 1.2, section 5.5.6.3).

use serde::{Deserialize, Serialize};

/// Bytes of one entry: tag and value, packed.
const ENTRY_BYTES: usize = 10;
/// Bytes of a list that are looked at: more entries than there are tags.
pub const BYTES_MAX: usize = 32 * ENTRY_BYTES;

/// The guest's own figures; what it does not tell is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Statistics {
    /// Bytes read from swap since boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in_bytes: Option<u64>,
    /// Bytes written to swap since boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out_bytes: Option<u64>,
    /// Page faults that needed a disk, since boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Memory that is used for nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_bytes: Option<u64>,
    /// Memory that the guest has, without the balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// Memory that could be used without swapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
    /// Memory in caches that could be dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cached_bytes: Option<u64>,
}

impl Statistics {
    /// Reads a list. Unknown tags are skipped, the last of equal ones counts, what is left of a cut entry is nothing.
    pub fn parse(list: &[u8]) -> Self {
        let mut found = Self::default();
        for entry in list.as_chunks::<ENTRY_BYTES>().0 {
            let [low, high, value @ ..] = *entry;
            let field = match u16::from_le_bytes([low, high]) {
                0 => &mut found.swap_in_bytes,
                1 => &mut found.swap_out_bytes,
                2 => &mut found.major_faults,
                3 => &mut found.minor_faults,
                4 => &mut found.free_bytes,
                5 => &mut found.total_bytes,
                6 => &mut found.available_bytes,
                7 => &mut found.cached_bytes,
                _ => continue,
            };
            *field = Some(u64::from_le_bytes(value));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_tags_are_read_and_others_skipped() {
        let mut list = Vec::new();
        for (tag, value) in [(4u16, 100u64), (9, 5), (65535, 6), (4, 200), (7, u64::MAX)] {
            list.extend(tag.to_le_bytes());
            list.extend(value.to_le_bytes());
        }
        list.extend([5, 0, 1]);
        let expected = Statistics { free_bytes: Some(200), cached_bytes: Some(u64::MAX), ..Statistics::default() };
        assert_eq!(Statistics::parse(&list), expected);
        assert_eq!(Statistics::parse(&[]), Statistics::default());
    }
}
