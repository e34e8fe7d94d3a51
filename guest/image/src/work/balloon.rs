//! Gives memory that nobody needs to the host: as much as it asks for, all that becomes free, and (for a migration) a list of
//! what is free at this moment.

use alloc::vec::Vec;

use super::memory::Memory;
use crate::memory::pool::Unit;
use crate::time::{MILLISECOND, Next};
use crate::virtio::balloon::{Balloon as Device, Ranges, Wish};

/// MiB in one report or hint.
const UNITS: usize = 8;
/// When there is nothing to give although the host asks for it: until the next look, in nanoseconds.
const RETRY: u64 = 50 * MILLISECOND;
/// Ids below are commands (Virtio 1.2, 5.5.6.6).
const STOP: u32 = 0;
const DONE: u32 = 1;

/// How far a session of hints has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hinting {
    Idle,
    /// The id is to be said.
    Begin(u32),
    /// Units from here on are to be named.
    At(usize),
}

/// The state of giving.
pub struct Balloon {
    device: Device,
    wish: Wish,
    /// The MiB that goes in or out of the balloon.
    moving: Option<usize>,
    reported: Vec<usize>,
    hinted: Vec<usize>,
    hinting: Hinting,
}

impl Balloon {
    /// Over `device`, empty.
    pub fn new(device: Device) -> Self {
        Self {
            device,
            wish: Wish::default(),
            moving: None,
            reported: Vec::new(),
            hinted: Vec::new(),
            hinting: Hinting::Idle,
        }
    }

    /// Takes answers, and asks what is due.
    pub fn poll(&mut self, now: u64, memory: &mut Memory) -> Next {
        if let Some(wish) = self.device.wish() {
            if wish.command != self.wish.command {
                self.hinting = match wish.command {
                    STOP | DONE => Hinting::Idle,
                    id => Hinting::Begin(id),
                };
            }
            self.wish = wish;
        }
        self.take_answers(memory);
        let next = self.inflate(now, memory);
        self.report(memory);
        self.hint(memory);
        next
    }

    fn take_answers(&mut self, memory: &mut Memory) {
        let answered = self.device.answered(|| memory.free_bytes(), memory.bytes());
        let pool = memory.pool();
        if answered.inflate | answered.deflate
            && let Some(unit) = self.moving.take()
        {
            pool.put(unit, if answered.inflate { Unit::Ballooned } else { Unit::Host });
            let pages = pool.count(Unit::Ballooned) as u32 * PAGES_PER_UNIT;
            self.device.tell(pages);
        }
        if answered.report {
            self.reported.drain(..).for_each(|unit| pool.put(unit, Unit::Host));
        }
        if answered.hints {
            self.hinted.drain(..).for_each(|unit| pool.put(unit, Unit::Free));
        }
    }

    fn inflate(&mut self, now: u64, memory: &mut Memory) -> Next {
        if !self.device.is_idle() {
            return Next::Never;
        }
        let wanted = (self.wish.target / PAGES_PER_UNIT) as usize;
        let have = memory.pool().count(Unit::Ballooned);
        self.moving = if have < wanted {
            memory.pool().lend_last()
        } else if have > wanted {
            memory.pool().ballooned()
        } else {
            return Next::Never;
        };
        let Some(unit) = self.moving else { return Next::At(now + RETRY) };
        self.device.request(have < wanted, memory.addresses(unit));
        Next::Never
    }

    fn report(&mut self, memory: &mut Memory) {
        if !self.device.can_report_now() {
            return;
        }
        let ranges = lend(memory, 0, &mut self.reported);
        if !ranges.is_empty() && !self.device.report(ranges) {
            self.reported.drain(..).for_each(|unit| memory.pool().put(unit, Unit::Free));
        }
    }

    fn hint(&mut self, memory: &mut Memory) {
        if !self.device.can_hint_now() {
            return;
        }
        match self.hinting {
            Hinting::Idle => {}
            Hinting::Begin(id) => {
                if self.device.say(id) {
                    self.hinting = Hinting::At(0);
                }
            }
            Hinting::At(from) => {
                let ranges = lend(memory, from, &mut self.hinted);
                let last = self.hinted.last().copied();
                let sent = if ranges.is_empty() { self.device.say(STOP) } else { self.device.hint(ranges) };
                match last {
                    _ if !sent => self.hinted.drain(..).for_each(|unit| memory.pool().put(unit, Unit::Free)),
                    Some(last) => self.hinting = Hinting::At(last + 1),
                    None => self.hinting = Hinting::Idle,
                }
            }
        }
    }

    /// Switches the device's interrupts on or off, and says whether there is an answer already.
    pub fn set_interrupts(&mut self, enable: bool) -> bool {
        self.device.set_interrupts(enable)
    }
}

const PAGES_PER_UNIT: u32 = 256;

/// Lends some MiB from `from` on that the host keeps memory for, and says where they are.
fn lend(memory: &mut Memory, from: usize, into: &mut Vec<usize>) -> Ranges {
    let (mut ranges, mut next) = (Ranges::new(), from);
    while into.len() < UNITS
        && let Some(unit) = memory.pool().lend_free(next)
    {
        next = unit + 1;
        into.push(unit);
        for address in memory.addresses(unit) {
            let page = crate::memory::PAGE_BYTES;
            match ranges.last_mut() {
                Some((start, bytes)) if *start + *bytes == address => *bytes += page,
                _ => ranges.push((address, page)),
            }
        }
    }
    ranges
}
