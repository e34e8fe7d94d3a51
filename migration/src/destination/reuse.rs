//! What an earlier attempt has left in the images here.

use std::ops::Range;

use crate::blocks;
use crate::guest::{BlockReader, DiskLayout};
use crate::page::{StrongDigest, is_zero, strong_digest};

/// Digests of `wanted`, in order; `None` where there is nothing but zeroes, and if the image cannot be read: all of it is sent then.
pub(super) fn digests(
    reader: &mut dyn BlockReader,
    layout: &DiskLayout,
    wanted: Range<u64>,
) -> Vec<Option<StrongDigest>> {
    let mut digests = vec![None; (wanted.end - wanted.start) as usize];
    let read = blocks::read(reader, layout, wanted.clone(), |block, bytes| {
        if let Some(place) = digests.get_mut((block - wanted.start) as usize) {
            *place = (!is_zero(bytes)).then(|| strong_digest(bytes));
        }
        Ok(())
    });
    if let Err(error) = read {
        tracing::warn!(error = %error.chain(), "the image of an earlier attempt cannot be read");
        digests.fill(None);
    }
    digests
}
