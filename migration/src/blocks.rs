//! Reading many blocks of a disk with a full queue.

use crate::error::{Doing, MigrationError};
use crate::guest::{BlockReader, DiskLayout};

/// Reads the blocks `wanted` and hands each to `take`, in the order in which they come. The first error ends it, once what was in
/// flight has landed: its buffers are the reader's.
///
/// # Errors
///
/// The disk's, or what `take` says.
pub(crate) fn read(
    reader: &mut dyn BlockReader,
    layout: &DiskLayout,
    wanted: impl IntoIterator<Item = u64>,
    mut take: impl FnMut(u64, &[u8]) -> Result<(), MigrationError>,
) -> Result<(), MigrationError> {
    let mut wanted = wanted.into_iter().fuse();
    let depth = reader.depth().max(1);
    let (mut flying, mut result) = (0, Ok(()));
    while result.is_ok() {
        while flying < depth
            && let Some(block) = wanted.next()
        {
            reader.submit(block).doing("reading a disk")?;
            flying += 1;
        }
        let mut one = |block: u64, bytes: &[u8]| {
            result = match bytes.get(..layout.block_bytes(block) as usize) {
                Some(bytes) => take(block, bytes),
                None => Err(MigrationError::Bug("disk reader: short block")),
            };
        };
        if !reader.complete(&mut one).doing("reading a disk")? {
            return if flying == 0 { Ok(()) } else { Err(MigrationError::Bug("disk reader")) };
        }
        flying = flying.saturating_sub(1);
    }
    while matches!(reader.complete(&mut |_, _| {}), Ok(true)) {}
    result
}
