//! Whether and how pages and blocks are compressed on their way: LZ4 blocks, only where that is quicker than sending them as
//! they are.
//!
//! On a fast link the processor is what a migration waits for, and compression of what does not become smaller makes it
//! slower; on a slow one it is the other way round. Nobody has to say which it is: each channel measures what a byte costs on
//! the link and what a byte costs to compress, and a page of each frame is compressed to see what is left of it. Compressing and
//! sending take turns on one thread, so their times add up; and the other end, which also has to place what arrives, is the busier
//! one, so its time counts as well.

use std::time::Duration;

use super::lz4;

/// Compression must promise to save a tenth: below that the measurements are noise, and the other end has to unpack.
const GAIN: f64 = 0.9;

/// Frames between two trials while differences are not worth it: first and at most.
const TRIAL: (u32, u32) = (8, 512);

/// What a byte costs to send it costs to receive as well, and unpacking is three times as fast as packing: of both ends' time,
/// packing takes this share as often as sending does.
const BOTH_ENDS: f64 = 2.0 / 3.0;

/// What remains of a measured cost each time it decides against compression: it may have been bad luck.
const DOUBT: f64 = 0.98;

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

    /// `bytes` took `time`.
    fn cost(&mut self, bytes: usize, time: Duration) {
        if bytes > 0 {
            self.add(time.as_secs_f64() / bytes as f64);
        }
    }
}

/// How many kinds of data are told apart by what is left of them: what becomes nearly nothing is compressed several times as
/// fast as what hardly shrinks.
const KINDS: usize = 8;

/// What one channel has measured; a function of nothing but what it was told.
#[derive(Debug, Default)]
pub struct Costs {
    /// Seconds to send a byte.
    link: Mean,
    /// Seconds to compress a byte of a whole frame, by what is left of it.
    pack: [Mean; KINDS],
    /// Seconds to compress a byte of a sample: always more.
    sample: Mean,
}

fn kind(left: f64) -> usize {
    ((left * KINDS as f64) as usize).min(KINDS - 1)
}

impl Costs {
    /// `bytes` went out in `time`: through TLS and the socket, and what the bandwidth limit held them back for.
    pub fn sent(&mut self, bytes: usize, time: Duration) {
        self.link.cost(bytes, time);
    }

    /// A frame of `bytes`, of which `left` of each byte was expected to remain, was compressed in `time`.
    pub fn packed(&mut self, bytes: usize, left: f64, time: Duration) {
        self.pack[kind(left)].cost(bytes, time);
    }

    /// A sample of `bytes` was compressed in `time`.
    pub fn sampled(&mut self, bytes: usize, time: Duration) {
        self.sample.cost(bytes, time);
    }

    /// Whether sending a frame as it is takes both ends longer than compressing it, sending what is `left` of each byte, and
    /// unpacking that. A kind of data that was never compressed is tried if it would be worth it at no cost; what compressing it
    /// has cost once is doubted a little more each time it is not. False before anything was sent.
    pub fn pays(&mut self, left: f64) -> bool {
        let Some(link) = self.link.0 else { return false };
        let Some(pack) = &mut self.pack[kind(left)].0 else { return left < GAIN };
        let pays = BOTH_ENDS * *pack + left * link < GAIN * link;
        if !pays && left < GAIN {
            *pack *= DOUBT;
        }
        pays
    }

    /// Whether sending takes so much longer than compressing that much would be won, if only the data became smaller.
    pub fn link_is_slow(&self) -> bool {
        self.sample.0.zip(self.link.0).is_some_and(|(pack, link)| pack < SLOW * link)
    }
}

/// Decides frame by frame whether pages are sent as differences. What is left of those is known only afterwards, so it is
/// remembered, and tried now and then while it is not worth it.
#[derive(Debug)]
pub struct Trials {
    costs: Costs,
    /// What remained of a byte.
    left: Mean,
    /// Frames until the next trial.
    wait: u32,
    pause: u32,
}

impl Default for Trials {
    fn default() -> Self {
        // The first frame is tried: it can be expected to pay.
        Self { costs: Costs::default(), left: Mean::default(), wait: 0, pause: TRIAL.0 / 2 }
    }
}

impl Trials {
    /// Whether the next frame is to hold differences.
    pub fn decide(&mut self) -> bool {
        let pays = self.left.0.is_some_and(|left| self.costs.pays(left));
        if pays {
            (self.wait, self.pause) = (TRIAL.0, TRIAL.0);
            return true;
        }
        if self.wait > 0 {
            self.wait -= 1;
            return false;
        }
        self.pause = (self.pause * 2).min(TRIAL.1);
        self.wait = self.pause;
        true
    }

    /// See [`Costs::sent`].
    pub fn sent(&mut self, bytes: usize, time: Duration) {
        self.costs.sent(bytes, time);
    }

    /// `bytes` became `left` in `time`.
    pub fn packed(&mut self, bytes: usize, left: usize, time: Duration) {
        if bytes > 0 {
            let left = left as f64 / bytes as f64;
            self.left.add(left);
            self.costs.packed(bytes, left, time);
        }
    }
}

/// Compresses `plain` into the start of `packed`, which grows to what that may take and is not cleared. Returns how many bytes
/// it became, unless it would not become smaller.
pub fn pack(plain: &[u8], packed: &mut Vec<u8>) -> Option<usize> {
    let most = lz4_flex::block::get_maximum_output_size(plain.len());
    if packed.len() < most {
        packed.resize(most, 0);
    }
    lz4_flex::block::compress_into(plain, packed).ok().filter(|&length| length < plain.len())
}

/// Unpacks into `plain`, which has the length that it must become.
///
/// # Errors
///
/// In words, if it is no LZ4 block or becomes longer or shorter.
pub fn unpack(packed: &[u8], plain: &mut [u8]) -> Result<(), String> {
    match lz4::unpack(packed, plain) {
        Ok(length) if length == plain.len() => Ok(()),
        Ok(length) => Err(format!("it unpacks to {length} bytes instead of {}", plain.len())),
        Err(error) => Err(format!("it is no LZ4 block of {} bytes: {error}", plain.len())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FRAME: usize = 256 << 10;

    fn costs(link: f64, pack: f64) -> Costs {
        let mut costs = Costs::default();
        assert!(!costs.pays(0.0), "nothing is known");
        costs.sent(FRAME, Duration::from_secs_f64(FRAME as f64 / link));
        assert!(costs.pays(0.0) && !costs.pays(0.95), "what may pay is tried");
        for kind in 0..KINDS {
            let left = kind as f64 / KINDS as f64;
            costs.packed(FRAME, left, Duration::from_secs_f64(FRAME as f64 / pack));
        }
        assert!(!costs.link_is_slow(), "half is known");
        costs.sampled(FRAME, Duration::from_secs_f64(FRAME as f64 / pack));
        costs
    }

    #[test]
    fn what_shrinks_is_compressed_where_the_link_is_slower_than_that() {
        let mut slow = costs(1e8, 6e8);
        assert!(slow.pays(0.5) && slow.pays(0.75) && !slow.pays(0.85) && slow.link_is_slow());
        let mut fast = costs(2e9, 6e8);
        assert!(!fast.pays(0.0) && !fast.link_is_slow());
        // As fast as sending: only for what becomes nearly nothing.
        let mut even = costs(1e9, 1e9);
        assert!(even.pays(0.02) && !even.pays(0.3) && !even.link_is_slow());
        assert!(costs(1e9, 1e12).pays(0.89) && !costs(1e9, 1e12).pays(1.0));
    }

    #[test]
    fn kinds_of_data_are_told_apart() {
        let mut costs = costs(1e9, 5e8);
        assert!(!costs.pays(0.02) && !costs.pays(0.5));
        for _ in 0..20 {
            costs.packed(FRAME, 0.02, Duration::from_secs_f64(FRAME as f64 / 4e9));
        }
        assert!(costs.pays(0.02) && !costs.pays(0.5));
    }

    #[test]
    fn a_bad_measurement_is_doubted_in_the_end() {
        let mut costs = costs(1e9, 1e8);
        let refused = (0..).take_while(|_| !costs.pays(0.02)).count();
        assert!((50..200).contains(&refused), "{refused}");
        assert!((0..1000).all(|_| !costs.pays(0.95)), "there is nothing to be tried");
    }

    #[test]
    fn costs_follow_the_link() {
        let mut costs = costs(2e9, 6e8);
        for _ in 0..20 {
            costs.sent(FRAME, Duration::from_secs_f64(FRAME as f64 / 1e8));
        }
        assert!(costs.pays(0.5));
    }

    /// Frames of `frames` with differences, on a link of `link` bytes per second, where `left` of each byte remains.
    fn tried(trials: &mut Trials, frames: u32, link: f64, left: f64) -> u32 {
        let mut count = 0;
        for _ in 0..frames {
            let mut bytes = FRAME;
            if trials.decide() {
                count += 1;
                bytes = (FRAME as f64 * left) as usize;
                trials.packed(FRAME, bytes, Duration::from_secs_f64(FRAME as f64 / 2e9));
            }
            trials.sent(bytes, Duration::from_secs_f64(bytes as f64 / link));
        }
        count
    }

    #[test]
    fn differences_are_tried_and_given_up_where_pages_change_as_a_whole() {
        let mut trials = Trials::default();
        assert_eq!(tried(&mut trials, 1000, 1e8, 0.02), 1000);
        assert!(tried(&mut trials, 1000, 1e8, 1.0) < 30, "pages change as a whole");
        assert!(tried(&mut trials, 2000, 1e8, 0.02) > 1000, "and again little of them");
    }

    proptest! {
        #[test]
        fn what_is_packed_comes_back(word in proptest::collection::vec(any::<u8>(), 1..64), times in 1usize..200) {
            let plain: Vec<u8> = word.iter().copied().cycle().take(word.len() * times).collect();
            let mut packed = Vec::new();
            if let Some(length) = pack(&plain, &mut packed) {
                let packed = &packed[..length];
                prop_assert!(length < plain.len());
                let mut back = vec![0; plain.len()];
                prop_assert_eq!(unpack(packed, &mut back), Ok(()));
                prop_assert_eq!(&back, &plain);
                let mut longer = vec![0; plain.len() + 1];
                prop_assert!(unpack(packed, &mut longer).is_err());
                prop_assert!(unpack(packed, &mut longer[..plain.len() - 1]).is_err());
            }
        }

        #[test]
        fn garbage_is_refused_or_fits(packed in proptest::collection::vec(any::<u8>(), 0..300), length in 0usize..5000) {
            let mut plain = vec![0; length];
            let _ = unpack(&packed, &mut plain);
        }
    }
}
