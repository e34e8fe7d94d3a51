//! A driver for tests: it sets a device up through its registers and works its queues in a guest memory of 16 MiB.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Wiring;
use super::mmio::MmioTransport;
use crate::device::BusDevice;
use crate::memory::GuestRam;

pub const RAM_BYTES: usize = 16 << 20;
/// Queue `i` lies at `QUEUES + i * QUEUE_STRIDE`: descriptors, available ring, used ring.
pub const QUEUES: u64 = 0x10_0000;
pub const QUEUE_STRIDE: u64 = 0x4000;
/// Free for data from here on.
pub const DATA: u64 = 0x20_0000;

pub const F_NEXT: u16 = 1;
pub const F_WRITE: u16 = 2;
pub const F_INDIRECT: u16 = 4;

/// Descriptors that join a device to its test.
pub struct Board {
    pub ram: GuestRam,
    pub interrupt: EventFd,
    pub notify: Vec<EventFd>,
}

impl Board {
    pub fn new(queues: usize) -> Self {
        let ram = crate::memory::Memory::new(RAM_BYTES as u64 >> 20).unwrap().ram().clone();
        Self::with_ram(ram, queues)
    }

    pub fn with_ram(ram: GuestRam, queues: usize) -> Self {
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self { ram, interrupt: eventfd(), notify: (0..queues).map(|_| eventfd()).collect() }
    }

    pub fn wiring(&self) -> Wiring {
        Wiring {
            ram: self.ram.clone(),
            interrupt: Arc::new(self.interrupt.try_clone().unwrap()),
            notify: self.notify.iter().map(|notify| notify.try_clone().unwrap()).collect(),
        }
    }

    /// Whether a page was marked as written, and forgets it.
    pub fn take_dirty(&self, gpa: u64) -> bool {
        let region = self.ram.find_region(GuestAddress(gpa)).unwrap();
        let dirty = vm_memory::bitmap::Bitmap::dirty_at(&region.bitmap(), gpa as usize);
        (**region).bitmap().reset_addr_range(gpa as usize, 4096);
        dirty
    }
}

/// The driver's side of one queue.
pub struct DriverQueue {
    base: u64,
    pub size: u16,
    next_descriptor: u16,
    pub available: u16,
    pub used_seen: u16,
}

impl DriverQueue {
    pub fn new(index: usize, size: u16) -> Self {
        let base = QUEUES + index as u64 * QUEUE_STRIDE;
        Self { base, size, next_descriptor: 0, available: 0, used_seen: 0 }
    }

    pub fn descriptors(&self) -> u64 {
        self.base
    }

    pub fn avail_ring(&self) -> u64 {
        self.base + 0x2000
    }

    pub fn used_ring(&self) -> u64 {
        self.base + 0x3000
    }

    pub fn write_descriptor(&self, ram: &GuestRam, index: u16, gpa: u64, bytes: u32, flags: u16, next: u16) {
        let at = GuestAddress(self.descriptors() + u64::from(index) * 16);
        ram.write_obj(gpa, at).unwrap();
        ram.write_obj(bytes, GuestAddress(at.0 + 8)).unwrap();
        ram.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        ram.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Makes a chain of (address, length, writable) available; returns its head.
    pub fn add(&mut self, ram: &GuestRam, parts: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor;
        for (position, &(gpa, bytes, writable)) in parts.iter().enumerate() {
            let index = self.next_descriptor;
            let next = (index + 1) % self.size;
            let more = if position + 1 < parts.len() { F_NEXT } else { 0 };
            self.write_descriptor(ram, index, gpa, bytes, more | if writable { F_WRITE } else { 0 }, next);
            self.next_descriptor = next;
        }
        self.offer(ram, head);
        head
    }

    /// Makes a head available.
    pub fn offer(&mut self, ram: &GuestRam, head: u16) {
        let slot = self.avail_ring() + 4 + u64::from(self.available % self.size) * 2;
        ram.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        ram.store(self.available, GuestAddress(self.avail_ring() + 2), Ordering::SeqCst).unwrap();
        fence(Ordering::SeqCst);
    }

    /// Next used entry, if there is one: (head, length).
    pub fn used(&mut self, ram: &GuestRam) -> Option<(u16, u32)> {
        let index: u16 = ram.load(GuestAddress(self.used_ring() + 2), Ordering::SeqCst).unwrap();
        if index == self.used_seen {
            return None;
        }
        let entry = self.used_ring() + 4 + u64::from(self.used_seen % self.size) * 8;
        self.used_seen = self.used_seen.wrapping_add(1);
        let head: u32 = ram.read_obj(GuestAddress(entry)).unwrap();
        Some((head as u16, ram.read_obj(GuestAddress(entry + 4)).unwrap()))
    }

    /// Asks for an interrupt at the next used entry.
    fn want_interrupt(&self, ram: &GuestRam) {
        let used_event = self.avail_ring() + 4 + u64::from(self.size) * 2;
        ram.store(self.used_seen, GuestAddress(used_event), Ordering::SeqCst).unwrap();
        fence(Ordering::SeqCst);
    }

    /// Whether the device wants to be told of entry `available - 1` (with event index).
    pub fn notification_wanted(&self, ram: &GuestRam, before: u16) -> bool {
        let at = self.used_ring() + 4 + u64::from(self.size) * 8;
        let event: u16 = ram.load(GuestAddress(at), Ordering::SeqCst).unwrap();
        self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(before)
    }
}

/// A driver of a device with its registers.
pub struct Driver {
    pub board: Board,
    pub transport: MmioTransport,
    pub queues: Vec<DriverQueue>,
}

impl Driver {
    pub fn new(board: Board, transport: MmioTransport, queue_size: u16) -> Self {
        let queues = (0..board.notify.len()).map(|index| DriverQueue::new(index, queue_size)).collect();
        Self { board, transport, queues }
    }

    pub fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub fn offered(&mut self) -> u64 {
        self.write(0x14, 1);
        let high = u64::from(self.read(0x10));
        self.write(0x14, 0);
        high << 32 | u64::from(self.read(0x10))
    }

    /// The whole dance (virtio 1.2, section 3.1.1), with these features.
    pub fn start(&mut self, features: u64) {
        self.write(0x70, 0);
        assert_eq!(self.read(0x70), 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.write(0x24, 0);
        self.write(0x20, features as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11, "features {features:#x} refused");
        for index in 0..self.queues.len() {
            self.set_up_queue(index);
        }
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15);
    }

    pub fn set_up_queue(&mut self, index: usize) {
        let size = self.queues[index].size;
        self.queues[index] = DriverQueue::new(index, size);
        let base = self.queues[index].base;
        let zeroes = vec![0; QUEUE_STRIDE as usize];
        self.board.ram.write_slice(&zeroes, GuestAddress(base)).unwrap();
        let (avail, used) = (self.queues[index].avail_ring(), self.queues[index].used_ring());
        self.write(0x30, index as u32);
        assert!(self.read(0x34) >= u32::from(size));
        self.write(0x38, u32::from(size));
        for (offset, address) in [(0x80, base), (0x90, avail), (0xa0, used)] {
            self.write(offset, address as u32);
            self.write(offset + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
        assert_eq!(self.read(0x44), 1);
    }

    pub fn kick(&self, queue: usize) {
        self.board.notify[queue].write(1).unwrap();
    }

    /// Waits for the next used entry of a queue by interrupts alone: a lost one fails the test.
    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        self.try_wait_used(queue, Duration::from_secs(10)).expect("no used buffer and interrupt within 10 s")
    }

    pub fn try_wait_used(&mut self, queue: usize, patience: Duration) -> Option<(u16, u32)> {
        let end = Instant::now() + patience;
        loop {
            self.queues[queue].want_interrupt(&self.board.ram);
            if let Some(used) = self.queues[queue].used(&self.board.ram) {
                return Some(used);
            }
            let left = end.checked_duration_since(Instant::now())?;
            self.wait_interrupt(left);
            let status = self.read(0x60);
            self.write(0x64, status);
        }
    }

    /// True if an interrupt came.
    pub fn wait_interrupt(&self, patience: Duration) -> bool {
        // SAFETY: the descriptor is open as long as the board.
        let line =
            unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&self.board.interrupt)) };
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(line.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).unwrap() > 0 && self.board.interrupt.read().is_ok()
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_needs_reset(&mut self) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.read(0x70) & 64 == 0 {
            assert!(Instant::now() < end, "no DEVICE_NEEDS_RESET within 10 s");
            self.wait_interrupt(Duration::from_millis(100));
        }
    }

    pub fn put(&self, gpa: u64, bytes: &[u8]) {
        self.board.ram.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    pub fn get(&self, gpa: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.board.ram.read_slice(&mut data, GuestAddress(gpa)).unwrap();
        data
    }
}
