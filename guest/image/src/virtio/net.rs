//! The network device (Virtio 1.2, 5.1), as smoltcp wants it: a frame at a time, out of buffers that stay where they are.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use smoltcp::phy::{DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

use super::hal::Hal;
use super::{Device, Unusable};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const FEATURE_MAC: u64 = 1 << 5;
/// Frames that may wait in each direction.
const FRAMES: usize = 128;
/// Used receive buffers are given back this many at a time: one notification for all of them.
const GIVE_BACK: usize = 32;
const BUFFER_BYTES: usize = 2048;
/// `struct virtio_net_hdr` with `num_buffers`; all zero means no offload.
const HEADER_BYTES: usize = 12;
/// Ethernet header and 1500 bytes.
const FRAME_BYTES_MAX: usize = 1514;

/// Taken if the device has no address of its own: a locally administered one.
const DEFAULT_MAC: [u8; 6] = [0x02, 0x48, 0x52, 0x00, 0x00, 0x01];

type Buffer = Box<[u8; BUFFER_BYTES]>;

/// One direction: its queue, its buffers, and which buffer each descriptor holds.
struct Ring {
    queue: VirtQueue<Hal, FRAMES>,
    buffers: Vec<Buffer>,
    owners: [usize; FRAMES],
    free: Vec<usize>,
}

impl Ring {
    fn new(device: &mut Device, index: u16) -> Result<Self, Unusable> {
        Ok(Self {
            queue: VirtQueue::new(&mut device.transport, index, false, false)?,
            buffers: (0..FRAMES).map(|_| Box::new([0; BUFFER_BYTES])).collect(),
            owners: [0; FRAMES],
            free: (0..FRAMES).rev().collect(),
        })
    }

    /// Gives buffer `index` to the device, to be filled or (`bytes` of it) sent.
    fn give(&mut self, index: usize, send: Option<usize>) {
        let buffer = &mut self.buffers[index];
        // SAFETY: the buffer stays in `self.buffers` and is not touched before `take` has popped it: it is not in `free`.
        let token = unsafe {
            match send {
                Some(bytes) => self.queue.add(&[&buffer[..bytes]], &mut []),
                None => self.queue.add(&[], &mut [&mut buffer[..]]),
            }
        };
        match token {
            Ok(token) => self.owners[usize::from(token)] = index,
            // There are as many descriptors as buffers.
            Err(_) => self.free.push(index),
        }
    }

    /// Takes back the next buffer that the device has used, with the bytes it says it wrote.
    fn take(&mut self, sent: bool) -> Option<(usize, usize)> {
        let token = self.queue.peek_used()?;
        let index = *self.owners.get(usize::from(token))?;
        let buffer = &mut self.buffers[index];
        // SAFETY: the same buffer that `give` added under this token. Only its address matters here.
        let written = unsafe {
            if sent {
                self.queue.pop_used(token, &[&buffer[..]], &mut [])
            } else {
                self.queue.pop_used(token, &[], &mut [&mut buffer[..]])
            }
        };
        Some((index, (written.ok()? as usize).min(BUFFER_BYTES)))
    }
}

/// The driver.
pub struct Net {
    device: Device,
    receive: Ring,
    transmit: Ring,
    unsent: bool,
    received: u64,
    sent: u64,
}

impl Net {
    /// Sets the device up and returns its address with it.
    pub fn new(mut device: Device) -> Result<(Self, [u8; 6]), Unusable> {
        let features = device.negotiate(FEATURE_MAC)?;
        let mut mac = DEFAULT_MAC;
        if features & FEATURE_MAC != 0 {
            for (offset, byte) in mac.iter_mut().enumerate() {
                *byte = device.transport.read_config_space(offset)?;
            }
        }
        let receive = Ring::new(&mut device, RECEIVE)?;
        let mut transmit = Ring::new(&mut device, TRANSMIT)?;
        // Nobody waits for a frame to be sent: its buffer is collected when one is needed.
        super::set_interrupts(&mut transmit.queue, false);
        device.transport.finish_init();
        let mut net = Self { device, receive, transmit, unsent: false, received: 0, sent: 0 };
        net.give_back(0);
        super::set_interrupts(&mut net.receive.queue, false);
        Ok((net, mac))
    }

    /// Gives free receive buffers to the device if there are more than `keep`.
    fn give_back(&mut self, keep: usize) {
        if self.receive.free.len() <= keep {
            return;
        }
        while let Some(index) = self.receive.free.pop() {
            self.receive.give(index, None);
        }
        self.device.notify(&self.receive.queue, RECEIVE);
    }

    /// Before a round: takes note of an interrupt.
    pub fn acknowledge(&mut self) {
        self.device.acknowledge();
    }

    /// After a round: gives buffers back and starts what is to be sent.
    pub fn finish(&mut self) {
        self.give_back(GIVE_BACK);
        if self.unsent {
            self.unsent = false;
            self.device.notify(&self.transmit.queue, TRANSMIT);
        }
    }

    /// Switches the receive interrupt on or off, and says whether there is a frame already.
    pub fn set_interrupts(&mut self, enable: bool) -> bool {
        super::set_interrupts(&mut self.receive.queue, enable)
    }

    /// Frames received and sent.
    pub fn counters(&self) -> (u64, u64) {
        (self.received, self.sent)
    }

    /// Collects what was sent if buffers are short; whether one is free now.
    pub fn can_send(&mut self) -> bool {
        if self.transmit.free.is_empty() {
            while let Some((index, _)) = self.transmit.take(true) {
                self.transmit.free.push(index);
            }
        }
        !self.transmit.free.is_empty()
    }
}

/// A received frame.
pub struct Received<'a> {
    ring: &'a mut Ring,
    index: usize,
    bytes: usize,
}

impl smoltcp::phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, handle: F) -> R {
        let result = handle(&self.ring.buffers[self.index][HEADER_BYTES..self.bytes]);
        self.ring.free.push(self.index);
        result
    }
}

/// Room for a frame to send.
pub struct Sending<'a> {
    ring: &'a mut Ring,
    unsent: &'a mut bool,
    sent: &'a mut u64,
}

impl smoltcp::phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, fill: F) -> R {
        let Some(index) = self.ring.free.pop() else {
            // Tokens are made only while a buffer is free.
            return fill(&mut vec![0; bytes]);
        };
        let end = HEADER_BYTES + bytes.min(FRAME_BYTES_MAX);
        let result = fill(&mut self.ring.buffers[index][HEADER_BYTES..end]);
        self.ring.give(index, Some(end));
        *self.unsent = true;
        *self.sent += 1;
        result
    }
}

impl smoltcp::phy::Device for Net {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Sending<'_>)> {
        if !self.can_send() {
            return None;
        }
        let (index, bytes) = self.receive.take(false)?;
        self.received += 1;
        // A frame shorter than its header is an empty one.
        let received = Received { ring: &mut self.receive, index, bytes: bytes.max(HEADER_BYTES) };
        Some((received, Sending { ring: &mut self.transmit, unsent: &mut self.unsent, sent: &mut self.sent }))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sending<'_>> {
        if !self.can_send() {
            return None;
        }
        Some(Sending { ring: &mut self.transmit, unsent: &mut self.unsent, sent: &mut self.sent })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_BYTES_MAX;
        capabilities
    }
}
