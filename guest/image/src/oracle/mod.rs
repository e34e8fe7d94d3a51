//! What is written to memory and disk so that it can be told afterwards whether it is still there: whole, current, and
//! where it belongs. Nothing in here touches hardware, and `cargo test -p headroom-guest` compiles it too.

pub mod block;
pub mod fill;
pub mod page;
pub mod sweep;
pub mod verifier;

/// What can be wrong with a page or block that was written before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// It holds nothing that was ever written there.
    Lost,
    /// It holds one whole other record: an older one, or that of another place.
    Stale,
    /// It holds parts that do not belong together.
    Torn,
}

/// Defects seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Defects {
    pub lost: u64,
    pub stale: u64,
    pub torn: u64,
}

impl Defects {
    /// Counts one.
    pub fn count(&mut self, defect: Defect) {
        match defect {
            Defect::Lost => self.lost += 1,
            Defect::Stale => self.stale += 1,
            Defect::Torn => self.torn += 1,
        }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.lost + self.stale + self.torn
    }
}

/// Mixes a number so that neighbours have nothing in common (the finalizer of splitmix64 by Steele, Lea and Flood, 2014).
pub fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
