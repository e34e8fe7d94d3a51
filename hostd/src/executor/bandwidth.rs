//! The bandwidth that an operator gave the migrations of this host while it ran, kept over restarts.
//!
//! It holds until the configuration says something else than it said then: whoever edits the file afterwards means that.

use serde::{Deserialize, Serialize};

use crate::store::embedded::Kind;
use crate::store::{Store, StoreError};

/// Under which it is kept among what was asked of this host.
const KEY: &str = "bandwidth";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Chosen {
    /// `None` is no limit.
    bandwidth_bytes_per_second: Option<u64>,
    /// What the configuration said when it was chosen.
    configured: Option<u64>,
}

/// What holds at the start of a daemon whose configuration says `configured`, in bytes per second.
///
/// # Errors
///
/// If the store cannot be read.
pub(super) fn load(store: &Store, configured: Option<u64>) -> Result<Option<u64>, StoreError> {
    let chosen: Option<Chosen> = store.get(Kind::Host, KEY)?;
    Ok(match chosen {
        Some(chosen) if chosen.configured == configured => chosen.bandwidth_bytes_per_second,
        _ => configured,
    })
}

/// Keeps what was chosen under this configuration.
///
/// # Errors
///
/// If it cannot be written.
pub(super) fn keep(store: &Store, configured: Option<u64>, chosen: Option<u64>) -> Result<(), StoreError> {
    store.put(Kind::Host, KEY, &Chosen { bandwidth_bytes_per_second: chosen, configured })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_holds_until_the_configuration_says_something_else() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let (config, edited) = (Some(16 << 20), Some(32 << 20));
        assert_eq!(load(&store, config).unwrap(), config);
        for chosen in [Some(64 << 20), None] {
            keep(&store, config, chosen).unwrap();
            assert_eq!(load(&store, config).unwrap(), chosen);
            assert_eq!((load(&store, edited).unwrap(), load(&store, None).unwrap()), (edited, None));
        }
    }
}
