//! LZ4 blocks, unpacked ([block format](https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md)).
//!
//! `lz4_flex` packs, and could unpack as well, but copies a match that overlaps itself byte by byte: 1 ns for each, while packing
//! takes a tenth of that. Guest memory is full of such matches (a word or a structure again and again), and the end that
//! receives is the busier one.

/// What a packed block is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A sequence is cut off.
    #[error("it ends in the midst of a sequence")]
    Short,
    /// More comes out than was announced.
    #[error("it becomes longer than it says")]
    Long,
    /// A match begins before the block, or at the place that it fills.
    #[error("it repeats what was never there")]
    Offset,
}

/// Matches are at least so long.
const MIN_MATCH: usize = 4;
/// A length that goes on in the next bytes.
const MORE: usize = 15;
/// Short pieces are copied as so many bytes where there is room: a fixed length is a few instructions instead of a call.
const SHORT: usize = 32;
/// A repeated pattern is copied in pieces that grow up to this: they stay in the first-level cache.
const PIECE: usize = 2 << 10;

/// Unpacks `packed` into the start of `plain`. Returns how many bytes it became.
///
/// # Errors
///
/// [`Malformed`]; then `plain` holds whatever came out before.
pub fn unpack(packed: &[u8], plain: &mut [u8]) -> Result<usize, Malformed> {
    let (mut from, mut to) = (0, 0);
    loop {
        let token = usize::from(*packed.get(from).ok_or(Malformed::Short)?);
        from += 1;
        let literals = length(packed, &mut from, token >> 4)?;
        let source = packed.get(from..).filter(|rest| rest.len() >= literals).ok_or(Malformed::Short)?;
        let target = plain.get_mut(to..).filter(|rest| rest.len() >= literals).ok_or(Malformed::Long)?;
        match (source.first_chunk::<SHORT>(), target.first_chunk_mut::<SHORT>()) {
            (Some(source), Some(target)) if literals <= SHORT => *target = *source,
            _ => target[..literals].copy_from_slice(&source[..literals]),
        }
        (from, to) = (from + literals, to + literals);
        if from == packed.len() {
            return Ok(to);
        }
        let &[low, high] = packed.get(from..).and_then(|rest| rest.first_chunk()).ok_or(Malformed::Short)?;
        from += 2;
        let offset = usize::from(u16::from_le_bytes([low, high]));
        let repeated = length(packed, &mut from, token & MORE)? + MIN_MATCH;
        if offset == 0 || offset > to {
            return Err(Malformed::Offset);
        }
        if repeated > plain.len() - to {
            return Err(Malformed::Long);
        }
        repeat(plain, to, offset, repeated);
        to += repeated;
    }
}

/// A length of which the token holds `nibble`.
fn length(packed: &[u8], from: &mut usize, nibble: usize) -> Result<usize, Malformed> {
    let mut length = nibble;
    if nibble == MORE {
        // Bounded by 255 times what has arrived.
        loop {
            let byte = *packed.get(*from).ok_or(Malformed::Short)?;
            *from += 1;
            length += usize::from(byte);
            if byte != u8::MAX {
                break;
            }
        }
    }
    Ok(length)
}

/// Fills `bytes` at `to` with what lies `offset` before, which may be what is filled here.
fn repeat(plain: &mut [u8], mut to: usize, offset: usize, mut bytes: usize) {
    if bytes <= offset && bytes <= SHORT && to + SHORT <= plain.len() {
        plain.copy_within(to - offset..to - offset + SHORT, to);
        return;
    }
    let mut piece = offset;
    while bytes > 0 {
        let now = piece.min(bytes);
        plain.copy_within(to - piece..to - piece + now, to);
        (to, bytes) = (to + now, bytes - now);
        // What was copied continues the pattern: twice as much of it lies before `to`.
        if piece < PIECE {
            piece *= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Unpacks by both, which must agree on everything but the words of a refusal.
    fn both(packed: &[u8], bytes: usize) -> Result<Vec<u8>, Malformed> {
        let mut ours = vec![0x5a; bytes];
        let mut theirs = vec![0xa5; bytes];
        let (length, other) = (unpack(packed, &mut ours), lz4_flex::block::decompress_into(packed, &mut theirs));
        assert_eq!(length.ok(), other.ok(), "{packed:?}");
        length.map(|length| {
            ours.truncate(length);
            assert_eq!(ours, theirs[..length], "{packed:?}");
            ours
        })
    }

    #[test]
    fn examples_of_the_format() {
        // Literals alone; a pattern of three bytes; lengths that go on; an empty block.
        assert_eq!(both(&[0x30, 1, 2, 3], 3), Ok(vec![1, 2, 3]));
        assert_eq!(both(&[0x31, 1, 2, 3, 3, 0, 0x10, 9], 9), Ok(vec![1, 2, 3, 1, 2, 3, 1, 2, 9]));
        let long = both(&[0x1f, 7, 1, 0, 255, 255, 10, 0], 4096);
        assert_eq!(long, Ok(vec![7; 1 + 15 + 255 + 255 + 10 + MIN_MATCH]));
        assert_eq!(both(&[0], 0), Ok(vec![]));
    }

    #[test]
    fn what_is_wrong_is_told() {
        let refused = |packed: &[u8], bytes| both(packed, bytes).unwrap_err();
        assert_eq!(refused(&[], 10), Malformed::Short);
        assert_eq!(refused(&[0x30, 1, 2], 10), Malformed::Short);
        assert_eq!(refused(&[0xf0, 255, 255], 10), Malformed::Short);
        assert_eq!(refused(&[0x10, 1, 1], 10), Malformed::Short);
        assert_eq!(refused(&[0x1f, 1, 1, 0], 100), Malformed::Short);
        assert_eq!(refused(&[0x10, 1, 1, 0], 100), Malformed::Short);
        assert_eq!(refused(&[0x30, 1, 2, 3], 2), Malformed::Long);
        assert_eq!(refused(&[0x10, 1, 1, 0, 0], 4), Malformed::Long);
        assert_eq!(refused(&[0x10, 1, 0, 0, 0], 100), Malformed::Offset);
        assert_eq!(refused(&[0x10, 1, 2, 0, 0], 100), Malformed::Offset);
    }

    /// Pieces of noise and of patterns with all distances.
    fn memory() -> impl Strategy<Value = Vec<u8>> {
        let piece = (proptest::collection::vec(any::<u8>(), 1..80), 1usize..300);
        proptest::collection::vec(piece, 1..12).prop_map(|pieces| {
            let piece = |(word, times): &(Vec<u8>, usize)| -> Vec<u8> { word.repeat(*times) };
            pieces.iter().flat_map(piece).collect()
        })
    }

    proptest! {
        #[test]
        fn what_was_packed_is_unpacked(plain in memory()) {
            let packed = lz4_flex::block::compress(&plain);
            prop_assert_eq!(both(&packed, plain.len()), Ok(plain));
        }

        #[test]
        fn what_was_damaged_is_refused_by_both(plain in memory(), at in any::<prop::sample::Index>(), byte in any::<u8>(), room in 0usize..20000) {
            let mut packed = lz4_flex::block::compress(&plain);
            let at = at.index(packed.len());
            packed[at] = byte;
            let _ = both(&packed, room);
            let _ = both(&packed[..at], plain.len());
        }

        #[test]
        fn garbage_is_unpacked_alike(packed in proptest::collection::vec(any::<u8>(), 0..300), room in 0usize..5000) {
            let _ = both(&packed, room);
        }
    }
}
