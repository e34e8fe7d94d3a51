//! The memory balloon (Virtio 1.2, 5.5): requests of one MiB, at most one in flight in each queue.

use alloc::boxed::Box;
use alloc::vec::Vec;

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

use super::hal::Hal;
use super::{Device, Unusable};
use crate::memory::PAGE_BYTES;

const DESCRIPTORS: usize = 16;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
const HINTS: u16 = 3;
const REPORTS: u16 = 4;

const FEATURE_STATISTICS: u64 = 1 << 1;
const FEATURE_HINTS: u64 = 1 << 3;
const FEATURE_REPORTS: u64 = 1 << 5;

const CONFIG_TARGET: usize = 0;
const CONFIG_ACTUAL: usize = 4;
const CONFIG_COMMAND: usize = 8;

const STATISTIC_FREE: u16 = 4;
const STATISTIC_TOTAL: u16 = 5;

/// Page frame numbers in a request: one MiB.
const FRAMES: usize = 256;

/// Free memory by address and bytes, as one request names it.
pub type Ranges = Vec<(u64, u64)>;

/// A queue with at most one request in flight.
struct Line {
    queue: VirtQueue<Hal, DESCRIPTORS>,
    index: u16,
    buffer: Box<[u8; FRAMES * 4]>,
    /// What is in flight: its token, how much of the buffer the device reads, and what it may take.
    flight: Option<(u16, usize, Ranges)>,
}

/// Memory that nobody uses, as the queue wants it.
fn slices(ranges: &Ranges) -> Vec<&'static mut [u8]> {
    let slice = |&(address, bytes): &(u64, u64)| {
        // SAFETY: whoever asks has lent the range to this request: it is RAM, and nobody touches it before the answer.
        unsafe { core::slice::from_raw_parts_mut(address as *mut u8, bytes as usize) }
    };
    ranges.iter().map(slice).collect()
}

impl Line {
    fn new(device: &mut Device, index: u16) -> Result<Self, Unusable> {
        let mut queue = VirtQueue::new(&mut device.transport, index, false, false)?;
        super::set_interrupts(&mut queue, false);
        Ok(Self { queue, index, buffer: Box::new([0; FRAMES * 4]), flight: None })
    }

    fn is_idle(&self) -> bool {
        self.flight.is_none()
    }

    /// Sends the first `bytes` of the buffer, and `ranges` for the device to take.
    fn send(&mut self, device: &mut Device, bytes: usize, ranges: Ranges) -> bool {
        let read: &[&[u8]] = if bytes == 0 { &[] } else { &[&self.buffer[..bytes]] };
        // SAFETY: the buffer and the ranges stay as they are until `answered` has popped them: there is only one request in
        // flight.
        let token = unsafe { self.queue.add(read, &mut slices(&ranges)) };
        let Ok(token) = token else { return false };
        self.flight = Some((token, bytes, ranges));
        device.notify(&self.queue, self.index);
        true
    }

    /// Whether the request in flight has been answered just now.
    fn answered(&mut self) -> bool {
        if self.queue.peek_used().is_none() {
            return false;
        }
        let Some((token, bytes, ranges)) = self.flight.take() else { return false };
        let read: &[&[u8]] = if bytes == 0 { &[] } else { &[&self.buffer[..bytes]] };
        // SAFETY: the same buffers that `send` added under this token.
        unsafe { self.queue.pop_used(token, read, &mut slices(&ranges)) }.is_ok()
    }
}

/// What was answered since the last look.
#[derive(Clone, Copy, Debug, Default)]
pub struct Answered {
    pub inflate: bool,
    pub deflate: bool,
    pub hints: bool,
    pub report: bool,
}

/// What the host wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Pages in the balloon.
    pub target: u32,
    /// Session of free page hints, or a command.
    pub command: u32,
}

/// The driver.
pub struct Balloon {
    device: Device,
    inflate: Line,
    deflate: Line,
    statistics: Line,
    hints: Line,
    reports: Line,
    features: u64,
    woken: bool,
}

impl Balloon {
    /// Sets the device up.
    pub fn new(mut device: Device) -> Result<Self, Unusable> {
        let features = device.negotiate(FEATURE_STATISTICS | FEATURE_HINTS | FEATURE_REPORTS)?;
        let inflate = Line::new(&mut device, INFLATE)?;
        let deflate = Line::new(&mut device, DEFLATE)?;
        let statistics = Line::new(&mut device, STATISTICS)?;
        let hints = Line::new(&mut device, HINTS)?;
        let reports = Line::new(&mut device, REPORTS)?;
        device.transport.finish_init();
        Ok(Self { device, inflate, deflate, statistics, hints, reports, features, woken: true })
    }

    /// Whether free pages can be reported.
    pub fn can_report(&self) -> bool {
        self.features & FEATURE_REPORTS != 0
    }

    /// What the host wants, if it may have changed.
    pub fn wish(&mut self) -> Option<Wish> {
        self.woken |= self.device.acknowledge();
        if !core::mem::take(&mut self.woken) {
            return None;
        }
        let transport = &self.device.transport;
        let target = transport.read_config_space(CONFIG_TARGET).ok()?;
        Some(Wish { target, command: transport.read_config_space(CONFIG_COMMAND).ok()? })
    }

    /// What was answered since the last look; the figures are given anew if they were taken.
    pub fn answered(&mut self, free_bytes: impl Fn() -> u64, total_bytes: u64) -> Answered {
        if self.features & FEATURE_STATISTICS != 0 && (self.statistics.is_idle() || self.statistics.answered()) {
            let entries = [(STATISTIC_FREE, free_bytes()), (STATISTIC_TOTAL, total_bytes)];
            for (place, (tag, value)) in self.statistics.buffer.chunks_exact_mut(10).zip(entries) {
                place[..2].copy_from_slice(&tag.to_le_bytes());
                place[2..].copy_from_slice(&value.to_le_bytes());
            }
            self.statistics.send(&mut self.device, entries.len() * 10, Ranges::new());
        }
        Answered {
            inflate: self.inflate.answered(),
            deflate: self.deflate.answered(),
            hints: self.hints.answered(),
            report: self.reports.answered(),
        }
    }

    /// Whether another MiB can be given or taken now.
    pub fn is_idle(&self) -> bool {
        self.inflate.is_idle() && self.deflate.is_idle()
    }

    /// Gives the pages at these addresses to the host, or takes them back.
    pub fn request(&mut self, inflate: bool, addresses: impl Iterator<Item = u64>) {
        let line = if inflate { &mut self.inflate } else { &mut self.deflate };
        let mut bytes = 0;
        for (place, address) in line.buffer.chunks_exact_mut(4).zip(addresses) {
            place.copy_from_slice(&((address / PAGE_BYTES) as u32).to_le_bytes());
            bytes += 4;
        }
        line.send(&mut self.device, bytes, Ranges::new());
    }

    /// Tells the host how many pages are in the balloon.
    pub fn tell(&mut self, pages: u32) {
        // The field is in the window, or the device would not have been set up.
        let _ = self.device.transport.write_config_space(CONFIG_ACTUAL, pages);
    }

    /// Whether a report can be made.
    pub fn can_report_now(&self) -> bool {
        self.can_report() && self.reports.is_idle()
    }

    /// Reports free memory.
    pub fn report(&mut self, ranges: Ranges) -> bool {
        self.reports.send(&mut self.device, 0, ranges)
    }

    /// Whether a hint can be made.
    pub fn can_hint_now(&self) -> bool {
        self.features & FEATURE_HINTS != 0 && self.hints.is_idle()
    }

    /// Says which session of hints begins here.
    pub fn say(&mut self, id: u32) -> bool {
        self.hints.buffer[..4].copy_from_slice(&id.to_le_bytes());
        self.hints.send(&mut self.device, 4, Ranges::new())
    }

    /// Names free memory to a migration.
    pub fn hint(&mut self, ranges: Ranges) -> bool {
        self.hints.send(&mut self.device, 0, ranges)
    }

    /// Switches the interrupts of answers on or off, and says whether there is one already.
    pub fn set_interrupts(&mut self, enable: bool) -> bool {
        let lines = [&mut self.inflate, &mut self.deflate, &mut self.statistics, &mut self.hints, &mut self.reports];
        lines.into_iter().fold(false, |some, line| super::set_interrupts(&mut line.queue, enable) | some)
    }
}
