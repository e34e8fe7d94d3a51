//! Which free page hints count (virtio 1.2, section 5.5.6.6).
//!
//! ```text
//! host   shows id 7 ............................ STOP ........ shows id 8 ....................... DONE
//! guest      says 7, hints, hints, says STOP       │ hints ......  says 8, hints ...               frees its pages
//!                    └── count ──┘                 └── do not: they may be from before ─┘
//! ```
//!
//! A hint says that a page was free when the guest made it. It is worth something only if that was after the dirty log was read
//! the last time: a page that was hinted, used again and written is dirty since, and a hint from before would hide that. So each
//! reading of the log gets an id of its own, and only hints that follow the guest's own word of that id count. The ids go on
//! in a machine that has moved, where hints of the old host may still be in the queue.

/// What the host shows when it wants no hints for now.
pub const STOP: u32 = 0;
/// What it shows when the guest may use the pages again.
pub const DONE: u32 = 1;
/// The first id of a session; smaller numbers are commands.
const FIRST: u32 = 0x8000_0000;

/// The state of the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hinting {
    /// The id of the last session.
    last: u32,
    shown: u32,
    /// The guest has said that it hints for the session that is shown.
    begun: bool,
    /// It has said that it has no more.
    over: bool,
}

impl Hinting {
    /// After `last`, the last id that was ever shown to this guest.
    pub fn new(last: u32) -> Self {
        Self { last, shown: STOP, begun: false, over: true }
    }

    /// The last id.
    pub fn last(&self) -> u32 {
        self.last
    }

    /// What the configuration space has to show.
    pub fn shown(&self) -> u32 {
        self.shown
    }

    /// Asks for hints.
    pub fn start(&mut self) {
        self.last = if (FIRST..u32::MAX).contains(&self.last) { self.last + 1 } else { FIRST };
        *self = Self { last: self.last, shown: self.last, begun: false, over: false };
    }

    /// Wants none for now; none that still comes counts.
    pub fn stop(&mut self) {
        *self = Self { last: self.last, shown: STOP, begun: false, over: true };
    }

    /// Wants none any more.
    pub fn finish(&mut self) {
        *self = Self { last: self.last, shown: DONE, begun: false, over: true };
    }

    /// The guest says which session it is at.
    pub fn guest_says(&mut self, id: u32) {
        self.over |= self.begun;
        self.begun = id == self.shown && id >= FIRST;
    }

    /// Whether a hint that comes now counts.
    pub fn counts(&self) -> bool {
        self.begun
    }

    /// Whether the guest has no more hints for this session, or there is none.
    pub fn is_over(&self) -> bool {
        self.over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hints_of_the_session_that_is_shown_count() {
        let mut hinting = Hinting::new(0);
        assert!(hinting.is_over() && !hinting.counts());
        hinting.guest_says(STOP);
        assert!(!hinting.counts(), "what the host shows as a command is no session");
        hinting.start();
        let first = hinting.shown();
        assert!(first >= FIRST && !hinting.counts() && !hinting.is_over());
        hinting.guest_says(first - 1);
        assert!(!hinting.counts() && !hinting.is_over());
        hinting.guest_says(first);
        assert!(hinting.counts() && !hinting.is_over());
        hinting.guest_says(STOP);
        assert!(!hinting.counts() && hinting.is_over());

        hinting.start();
        let second = hinting.shown();
        hinting.guest_says(first);
        assert!(second != first && !hinting.counts() && !hinting.is_over());
        hinting.guest_says(second);
        hinting.stop();
        assert!(!hinting.counts() && hinting.is_over());
        hinting.guest_says(second);
        assert!(!hinting.counts(), "it came too late");
        hinting.finish();
        hinting.guest_says(DONE);
        assert!(!hinting.counts() && hinting.shown() == DONE);
    }

    #[test]
    fn ids_never_look_like_commands() {
        for last in [0, 1, FIRST - 1, FIRST, u32::MAX - 1, u32::MAX] {
            let mut hinting = Hinting::new(last);
            hinting.start();
            assert!(hinting.shown() >= FIRST && hinting.shown() != last, "{last:#x}");
        }
    }
}
