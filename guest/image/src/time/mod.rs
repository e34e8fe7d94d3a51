//! Time: the clock and the one-shot timer.

pub mod clock;
pub mod timer;

pub use clock::Clock;
pub use timer::Timer;

/// Nanoseconds of a microsecond, a millisecond and a second.
pub const MICROSECOND: u64 = 1_000;
pub const MILLISECOND: u64 = 1_000_000;
pub const SECOND: u64 = 1_000_000_000;

/// When a part of the guest wants to be called again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// At once: there is more to do.
    Now,
    /// When the clock says so (nanoseconds), or earlier.
    At(u64),
    /// Not before an interrupt.
    Never,
}

impl Next {
    /// The earlier of the two.
    pub fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Now, _) | (_, Self::Now) => Self::Now,
            (Self::At(left), Self::At(right)) => Self::At(left.min(right)),
            (Self::At(time), Self::Never) | (Self::Never, Self::At(time)) => Self::At(time),
            (Self::Never, Self::Never) => Self::Never,
        }
    }
}
