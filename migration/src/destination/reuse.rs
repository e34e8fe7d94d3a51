//! What an earlier attempt has left in the images here.

use std::ops::Range;

use crate::blocks;
use crate::error::MigrationError;
use crate::guest::{BlockReader, DiskLayout};
use crate::page::{StrongDigest, is_zero, strong_digest};

/// Digests of `wanted`, in order; `None` where there is nothing but zeroes.
pub(super) fn digests(
    reader: &mut dyn BlockReader,
    layout: &DiskLayout,
    wanted: Range<u64>,
) -> Result<Vec<Option<StrongDigest>>, MigrationError> {
    let mut digests = vec![None; (wanted.end - wanted.start) as usize];
    blocks::read(reader, layout, wanted.clone(), |block, bytes| {
        if let Some(place) = digests.get_mut((block - wanted.start) as usize) {
            *place = (!is_zero(bytes)).then(|| strong_digest(bytes));
        }
        Ok(())
    })?;
    Ok(digests)
}
