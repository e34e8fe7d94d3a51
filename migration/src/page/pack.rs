//! Whether and how pages and blocks are compressed on their way: LZ4 blocks, only where that is quicker than sending them as
//! they are.
//!
//! On a fast link the processor is what a migration waits for, and compression makes it slower; on a slow one it is the other
//! way round. Nobody has to say which it is: each channel measures what a byte costs on the link, what a byte costs to compress,
//! and what is left of it, and goes on measuring. Compressing and sending take turns on one thread, so their times add up.

use std::time::Duration;

/// Compression must promise to save a tenth: below that the measurements are noise, and the other end has to unpack.
const GAIN: f64 = 0.9;

/// Frames between two trials while it is not worth it: first and at most. A trial costs as much as a frame on a fast link.
const TRIAL: (u32, u32) = (8, 512);

/// A link is slow if compressing a byte takes less than this share of the time in which it is sent.
const SLOW: f64 = 0.5;

/// Weight of the newest frame in what is remembered.
const NEWEST: f64 = 0.2;

/// Remembers costs in seconds per byte.
#[derive(Clone, Copy, Debug, Default)]
struct Mean(Option<f64>);

impl Mean {
    fn add(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |mean| mean + NEWEST * (value - mean)));
    }
}

/// Decides for one channel, frame by frame; a function of nothing but what it was told.
#[derive(Debug)]
pub struct Choice {
    /// Seconds to send a byte.
    link: Mean,
    /// Seconds to compress a byte.
    pack: Mean,
    /// What remains of a byte.
    left: Mean,
    /// Frames until the next trial.
    wait: u32,
    pause: u32,
}

impl Default for Choice {
    fn default() -> Self {
        Self { link: Mean::default(), pack: Mean::default(), left: Mean::default(), wait: TRIAL.0, pause: TRIAL.0 }
    }
}

impl Choice {
    /// Tries it with the first frame: it can be expected to pay.
    pub fn hopeful() -> Self {
        Self { wait: 0, ..Self::default() }
    }

    /// Whether sending takes so much longer than compressing that much would be won, if only the data became smaller.
    pub fn link_is_slow(&self) -> bool {
        self.pack.0.zip(self.link.0).is_some_and(|(pack, link)| pack < SLOW * link)
    }

    /// Whether the next frame is to be compressed.
    pub fn decide(&mut self) -> bool {
        if self.pays() {
            (self.wait, self.pause) = (TRIAL.0, TRIAL.0);
            return true;
        }
        if self.wait > 0 {
            self.wait -= 1;
            return false;
        }
        self.pause = (self.pause * 2).min(TRIAL.1);
        self.wait = self.pause;
        // However little was left of it: a link as fast as the compression can never gain.
        self.pack.0.is_none_or(|pack| self.link.0.is_some_and(|link| pack < link))
    }

    /// Whether sending takes longer than compressing and sending what is left; false before both are known.
    fn pays(&self) -> bool {
        let (Some(link), Some(pack), Some(left)) = (self.link.0, self.pack.0, self.left.0) else { return false };
        pack + left * link < GAIN * link
    }

    /// `bytes` went out in `time`: through TLS and the socket, and what the bandwidth limit held them back for.
    pub fn sent(&mut self, bytes: usize, time: Duration) {
        if bytes > 0 {
            self.link.add(time.as_secs_f64() / bytes as f64);
        }
    }

    /// `bytes` became `left` in `time`.
    pub fn packed(&mut self, bytes: usize, left: usize, time: Duration) {
        if bytes > 0 {
            self.pack.add(time.as_secs_f64() / bytes as f64);
            self.left.add(left as f64 / bytes as f64);
        }
    }
}

/// Compresses `plain` into `packed`, unless it would not become smaller.
pub fn pack(plain: &[u8], packed: &mut Vec<u8>) -> bool {
    packed.resize(lz4_flex::block::get_maximum_output_size(plain.len()), 0);
    match lz4_flex::block::compress_into(plain, packed) {
        Ok(length) if length < plain.len() => {
            packed.truncate(length);
            true
        }
        _ => false,
    }
}

/// Unpacks into `plain`, which has the length that it must become.
///
/// # Errors
///
/// In words, if it is no LZ4 block or becomes longer or shorter.
pub fn unpack(packed: &[u8], plain: &mut [u8]) -> Result<(), String> {
    match lz4_flex::block::decompress_into(packed, plain) {
        Ok(length) if length == plain.len() => Ok(()),
        Ok(length) => Err(format!("it unpacks to {length} bytes instead of {}", plain.len())),
        Err(error) => Err(format!("it is no LZ4 block of {} bytes: {error}", plain.len())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Frames compressed of `frames`, on a link of `link` bytes per second, where compression does `pack` bytes per second and
    /// leaves `left` of each.
    fn compressed(choice: &mut Choice, frames: u32, link: f64, pack: f64, left: f64) -> u32 {
        const FRAME: usize = 256 << 10;
        let mut count = 0;
        for _ in 0..frames {
            let mut bytes = FRAME;
            if choice.decide() {
                count += 1;
                bytes = (FRAME as f64 * left) as usize;
                choice.packed(FRAME, bytes, Duration::from_secs_f64(FRAME as f64 / pack));
            }
            choice.sent(bytes, Duration::from_secs_f64(bytes as f64 / link));
        }
        count
    }

    #[test]
    fn a_slow_link_gets_it_and_a_fast_one_does_not() {
        assert!(compressed(&mut Choice::default(), 1000, 1e8, 6e8, 0.5) > 980);
        // One trial tells that this link is quicker than the compression alone.
        assert_eq!(compressed(&mut Choice::default(), 1000, 2e9, 6e8, 0.1), 1);
        // Here it could pay, but what is sent does not become smaller.
        assert!(compressed(&mut Choice::default(), 1000, 1e8, 6e8, 1.0) < 10);
    }

    #[test]
    fn it_follows_the_link_and_the_data() {
        let mut choice = Choice::default();
        assert!(compressed(&mut choice, 5000, 2e9, 6e8, 0.5) < 5);
        assert!(compressed(&mut choice, 1000, 1e8, 6e8, 0.5) > 900, "the link became slow");
        assert!(compressed(&mut choice, 1000, 1e8, 6e8, 1.0) < 50, "the data became random");
        assert!(compressed(&mut choice, 2000, 1e8, 6e8, 0.3) > 1000, "and plain again");
        assert!(compressed(&mut choice, 2000, 2e9, 6e8, 0.3) < 50, "the link became fast");
    }

    proptest! {
        #[test]
        fn what_is_packed_comes_back(word in proptest::collection::vec(any::<u8>(), 1..64), times in 1usize..200) {
            let plain: Vec<u8> = word.iter().copied().cycle().take(word.len() * times).collect();
            let mut packed = Vec::new();
            if pack(&plain, &mut packed) {
                prop_assert!(packed.len() < plain.len());
                let mut back = vec![0; plain.len()];
                prop_assert_eq!(unpack(&packed, &mut back), Ok(()));
                prop_assert_eq!(&back, &plain);
                let mut longer = vec![0; plain.len() + 1];
                prop_assert!(unpack(&packed, &mut longer).is_err());
                prop_assert!(unpack(&packed, &mut longer[..plain.len() - 1]).is_err());
            }
        }

        #[test]
        fn garbage_is_refused_or_fits(packed in proptest::collection::vec(any::<u8>(), 0..300), length in 0usize..5000) {
            let mut plain = vec![0; length];
            let _ = unpack(&packed, &mut plain);
        }
    }
}
