//! Bytes of a hostile guest, or of a hostile source, given to the parts of a device that have to survive them. For the fuzz targets.

use std::cell::RefCell;
use std::fs::File;
use std::sync::Arc;

use migration::guest::{MemoryRegion, StatePayload};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::block::{self, Block};
use super::{Chain, Interrupt, QueueStateV1, Segment, VirtQueue, Wiring};
use crate::config::{DiskConfig, DiskSource};
use crate::device::{Device, Line};
use crate::disk::RawDisk;
use crate::memory::{GuestRam, Memory};

const RAM_BYTES: usize = 64 << 10;
const DISK_BYTES: u64 = 1 << 20;
/// Chains taken from one input.
const CHAINS: usize = 64;

/// An interrupt that nobody takes.
pub(crate) struct Deaf;

impl Line for Deaf {
    fn pulse(&self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Rig {
    ram: GuestRam,
    interrupt: Arc<Interrupt>,
}

impl Rig {
    fn new() -> Option<Self> {
        // Two regions with a hole between them: chains may span them, or miss.
        let half = RAM_BYTES / 2;
        let region = |gpa| MemoryRegion { gpa, bytes: half as u64 };
        let memory = Memory::with_regions(vec![region(0), region(half as u64 + 0x1000)]).ok()?;
        let ram = memory.ram().clone();
        let interrupt = Arc::new(Interrupt::new(Arc::new(Deaf)));
        Some(Self { ram, interrupt })
    }

    fn wiring(&self) -> Option<Wiring> {
        let notify = EventFd::new(EFD_NONBLOCK).ok()?;
        Some(Wiring { ram: self.ram.clone(), interrupt: Arc::new(Deaf), notify: vec![notify] })
    }

    fn fill(&self, bytes: &[u8]) {
        let half = RAM_BYTES / 2;
        let _ = self.ram.write_slice(&vec![0; half], GuestAddress(0));
        let _ = self.ram.write_slice(&bytes[..bytes.len().min(half)], GuestAddress(0));
    }
}

thread_local! {
    static RIG: RefCell<Option<Rig>> = RefCell::new(Rig::new());
}

fn with_rig(work: impl FnOnce(&Rig)) {
    RIG.with_borrow(|rig| {
        if let Some(rig) = rig {
            work(rig);
        }
    });
}

fn take<const N: usize>(data: &mut &[u8]) -> [u8; N] {
    let (head, rest) = data.split_at(data.len().min(N));
    *data = rest;
    let mut bytes = [0; N];
    bytes[..head.len()].copy_from_slice(head);
    bytes
}

/// A queue as a driver may have set it up, over memory that holds `data`; every chain is parsed as a request of a disk, and used.
pub fn virtqueue(mut data: &[u8]) {
    let data = &mut data;
    let flags = take::<1>(data)[0];
    let word = |data: &mut &[u8]| u16::from_le_bytes(take(data));
    let address = |data: &mut &[u8]| u64::from(u16::from_le_bytes(take(data))) & if flags & 1 == 0 { !0xf } else { !0 };
    let state = QueueStateV1 {
        size: word(data),
        ready: true,
        descriptors: address(data),
        available: address(data),
        used: address(data),
        next_avail: word(data),
        next_used: word(data),
    };
    with_rig(|rig| {
        rig.fill(data);
        let queue = VirtQueue::new(&state, 256, flags & 2 != 0, &rig.ram, &rig.interrupt);
        let Some(mut queue) = queue else { return };
        let (mut chain, mut segments) = (Chain::default(), Vec::new());
        for number in 0..CHAINS {
            if !queue.pop(&mut chain) {
                break;
            }
            assert!(chain.readable.len() + chain.writable.len() <= super::queue::MAX_SEGMENTS);
            block::examine(&rig.ram, &chain, DISK_BYTES, flags & 4 != 0, &mut segments);
            let written = Chain::bytes(&chain.writable).min(u32::MAX as usize) as u32;
            queue.push_used(chain.head, written);
            if number % 8 == 7 {
                queue.signal();
                queue.unpop(u16::from(flags >> 7));
            }
        }
        queue.signal();
    });
}

/// A request of a disk, its header and its data cut at arbitrary places.
pub fn disk_request(mut data: &[u8]) {
    let data = &mut data;
    let flags = take::<1>(data)[0];
    let cuts: [u8; 8] = take(data);
    with_rig(|rig| {
        rig.fill(data);
        let mut chain = Chain::default();
        let (mut at, writable) = (0, usize::from(flags >> 4) % 8);
        for (index, cut) in cuts.into_iter().enumerate() {
            let into = if index < 8 - writable { &mut chain.readable } else { &mut chain.writable };
            if !Segment::resolve(&rig.ram, at, usize::from(cut), into) {
                return;
            }
            at += u64::from(cut);
        }
        block::examine(&rig.ram, &chain, DISK_BYTES, flags & 1 != 0, &mut Vec::new());
    });
}

/// The saved state of a disk, as a source sends it: restored over an empty memory, looked at, and dropped.
pub fn block_state(data: &[u8]) {
    let Some(disk) = disk() else { return };
    let payload = StatePayload { slot: block::slot(&disk), bytes: data.to_vec() };
    with_rig(|rig| {
        rig.fill(&[]);
        let Some(wiring) = rig.wiring() else { return };
        if let Ok(block) = Block::restore(disk, wiring, &payload) {
            // What was accepted can be saved again.
            let saved = block.save().map(|payload| payload.bytes);
            assert!(saved.is_ok(), "{saved:?}");
        }
    });
}

/// A state that [`block_state`] accepts: that of a new device.
pub fn new_block_state() -> Option<Vec<u8>> {
    let wiring = RIG.with_borrow(|rig| rig.as_ref().and_then(Rig::wiring))?;
    let block = Block::new(disk()?, wiring).ok()?;
    block.pause().ok()?;
    Some(block.save().ok()?.bytes)
}

fn disk() -> Option<Arc<RawDisk>> {
    let fd = nix::sys::memfd::memfd_create("fuzz", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).ok()?;
    let file = File::from(fd);
    file.set_len(DISK_BYTES).ok()?;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)).into();
    let config = DiskConfig { id: "disk0".into(), source: DiskSource::Path(path), read_only: false };
    RawDisk::open(&config).ok().map(Arc::new)
}
