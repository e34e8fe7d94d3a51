//! Bytes of a hostile guest, or of a hostile source, given to the parts of a device that have to survive them. For the fuzz targets.

use std::cell::RefCell;
use std::fs::File;
use std::sync::Arc;

use migration::guest::{MemoryRegion, StatePayload};
use migration::page::SharedBitmap;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::balloon::{self, BalloonWorker};
use super::block::{self, Block};
use super::{Backend, Chain, Interrupt, QueueStateV1, Segment, VirtQueue, Wiring};
use crate::config::{DiskConfig, DiskSource};
use crate::device::{Device, Line};
use crate::disk::{Purpose, RawDisk};
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
    memory: Memory,
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
        Some(Self { memory, ram, interrupt })
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

/// A queue as a driver may have set it up; its addresses are aligned unless they must not be.
fn queue_state(data: &mut &[u8], aligned: bool) -> QueueStateV1 {
    let word = |data: &mut &[u8]| u16::from_le_bytes(take(data));
    let address = |data: &mut &[u8]| u64::from(u16::from_le_bytes(take(data))) & if aligned { !0xf } else { !0 };
    QueueStateV1 {
        size: word(data),
        ready: true,
        descriptors: address(data),
        available: address(data),
        used: address(data),
        next_avail: word(data),
        next_used: word(data),
    }
}

/// A queue over memory that holds `data`; every chain is parsed as a request of a disk, and used.
pub fn virtqueue(mut data: &[u8]) {
    let data = &mut data;
    let flags = take::<1>(data)[0];
    let state = queue_state(data, flags & 1 == 0);
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

/// One of a balloon's queues, over memory that holds `data`: pages are given back, figures read, hints taken.
pub fn balloon(mut data: &[u8]) {
    let data = &mut data;
    let flags = take::<1>(data)[0];
    let state = queue_state(data, flags & 8 == 0);
    with_rig(|rig| {
        rig.fill(data);
        let Some(wiring) = rig.wiring() else { return };
        let kicks = std::array::from_fn(|_| wiring.notify[0].try_clone().ok());
        let [Some(first), Some(second), Some(third), Some(fourth), Some(fifth)] = kicks else { return };
        let config = balloon::ConfigSpace::default();
        let parts = balloon::Parts {
            memory: rig.memory.clone(),
            interrupt: Arc::clone(&rig.interrupt),
            config: config.clone(),
            counters: Arc::default(),
            hint_id: Arc::default(),
        };
        let Ok(mut worker) = BalloonWorker::new([first, second, third, fourth, fifth], parts) else { return };
        let index = usize::from(flags & 7) % balloon::QUEUES;
        let mut queues: Vec<Option<VirtQueue>> = (0..balloon::QUEUES).map(|_| None).collect();
        worker.pause();
        queues[index] = VirtQueue::new(&state, 128, flags & 16 != 0, &rig.ram, &rig.interrupt);
        worker.activate(u64::MAX, queues);
        let free = Arc::new(SharedBitmap::new(rig.memory.pages()));
        let asked = flags & 32 != 0 && worker.start_hints(Arc::clone(&free));
        worker.run();
        worker.statistics();
        worker.ready(index as u64);
        worker.stop_hints(true);
        assert!(asked || free.count() == 0);
        (0..balloon::QUEUES).for_each(|index| worker.stop_queue(index));
        worker.reset();
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
    let payload = StatePayload { slot: block::slot(disk.image().id()), bytes: data.to_vec() };
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
    let config = DiskConfig { id: "disk0".into(), source: DiskSource::Path(path), read_only: false, shared: false };
    RawDisk::open(&config, Purpose::Use).ok().map(Arc::new)
}
