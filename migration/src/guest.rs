//! What a migration needs of a virtual machine and of its disks.
//!
//! The engine in this crate knows nothing of KVM, of files or of sockets of the guest: both ends are written against the
//! traits below. `vmm` implements them over KVM, a memfd and io_uring; `testing` implements them over plain vectors, so
//! that every phase and every failure of a migration is tested without a hypervisor.
//!
//! # Ordering contract
//!
//! * Between [`SourceGuest::pause`] and [`SourceGuest::resume`] nothing writes to guest memory or to a disk: vCPUs stop
//!   first, then devices finish or withdraw the requests that are in flight. `resume` starts devices before vCPUs.
//! * A page or block that is written after `collect_dirty` has returned is reported by the next `collect_dirty`. Bits that
//!   were collected belong to the caller: after a failed migration the next one starts with everything dirty.
//! * A page that was named as free may be left out, if it was named after the `collect_dirty` that reported it.
//! * After [`SourceGuest::fence`] the machine does not run again here until [`SourceGuest::unfence`], whatever happens.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::mirror::Bell;
use crate::page::{Bitmap, SharedBitmap};

/// Bytes in a page: the granularity of memory dirty tracking and transfer.
pub const PAGE_BYTES: u64 = 4096;

/// Bytes in a block: the granularity of disk dirty tracking and transfer.
pub const BLOCK_BYTES: u64 = 64 * 1024;

/// A run of guest-physical addresses backed by RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRegion {
    /// First guest-physical address; a multiple of [`PAGE_BYTES`].
    pub gpa: u64,
    /// Length in bytes; a multiple of [`PAGE_BYTES`].
    pub bytes: u64,
}

/// The shape of one disk as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLayout {
    /// The device's name in the machine's configuration.
    pub id: String,
    /// Capacity in bytes. The last block may be shorter than [`BLOCK_BYTES`].
    pub bytes: u64,
    /// The guest cannot write to it.
    pub read_only: bool,
}

impl DiskLayout {
    /// How many blocks cover the disk.
    pub fn blocks(&self) -> u64 {
        self.bytes.div_ceil(BLOCK_BYTES)
    }

    /// Bytes in block `block`: [`BLOCK_BYTES`], or less in the last one.
    pub fn block_bytes(&self, block: u64) -> u64 {
        self.bytes.saturating_sub(block.saturating_mul(BLOCK_BYTES)).min(BLOCK_BYTES)
    }
}

/// One device whose state travels: the name of its payload and the newest state version that this build writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSlot {
    /// For example `virtio-block/disk0`, `vcpu/0`, `irqchip`.
    pub name: String,
    /// State version; a destination refuses one that it does not know.
    pub version: u16,
}

/// The processor that the guest was shown, and that the destination must be able to offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct CpuProfile {
    /// CPUID leaves given to the guest: (function, index, eax, ebx, ecx, edx).
    #[serde(deserialize_with = "crate::wire::bounded::items")]
    pub leaves: Vec<[u32; 6]>,
    /// TSC frequency in kHz that the guest was started with.
    pub tsc_khz: u32,
}

/// Everything that both ends must agree on before the first page moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineLayout {
    /// The machine's name.
    pub machine: String,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// RAM, in ascending order of address. Page number `n` counts pages through these regions in order.
    #[serde(deserialize_with = "crate::wire::bounded::items")]
    pub memory: Vec<MemoryRegion>,
    /// Disks, in the order of their disk number on the wire.
    #[serde(deserialize_with = "crate::wire::bounded::items")]
    pub disks: Vec<DiskLayout>,
    /// Devices and other holders of state.
    #[serde(deserialize_with = "crate::wire::bounded::items")]
    pub devices: Vec<DeviceSlot>,
    /// What the guest knows of its processor.
    pub cpu: CpuProfile,
}

impl MachineLayout {
    /// Total number of pages over all regions.
    pub fn pages(&self) -> u64 {
        self.memory.iter().map(|region| region.bytes / PAGE_BYTES).sum()
    }
}

/// The saved state of one device, vCPU or interrupt controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatePayload {
    /// Name and version, as announced in [`MachineLayout::devices`].
    pub slot: DeviceSlot,
    /// Encoded by its owner; opaque here.
    pub bytes: Vec<u8>,
}

/// A failure inside the machine or one of its disks, told in words that name the cause and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct GuestError {
    /// Cause and remedy.
    pub message: String,
}

impl GuestError {
    /// Wraps a message.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into() }
    }
}

/// Result of an operation on the machine.
pub type GuestResult<T> = Result<T, GuestError>;

/// The machine at the source.
pub trait SourceGuest: Send + Sync {
    /// What the destination has to build.
    fn layout(&self) -> GuestResult<MachineLayout>;

    /// Starts to record written pages, by vCPUs and by devices. Idempotent.
    fn start_dirty_tracking(&self) -> GuestResult<()>;

    /// Stops recording; called after the switchover or on abort.
    fn stop_dirty_tracking(&self) -> GuestResult<()>;

    /// Sets in `into` (page numbers) every page written since the last call, and forgets them.
    fn collect_dirty(&self, into: &mut Bitmap) -> GuestResult<()>;

    /// The first run of pages at or after `from` that may hold something but zeroes. Pages outside such runs were never
    /// touched and read as zeroes: they need not even be looked at.
    fn next_populated(&self, from: u64) -> GuestResult<Option<Range<u64>>>;

    /// Copies pages `first..` into `buffer`, whose length is a multiple of [`PAGE_BYTES`]. The guest may be running: what
    /// is copied can be torn, and then the page is dirty.
    fn read_pages(&self, first: u64, buffer: &mut [u8]) -> GuestResult<()>;

    /// Asks the guest which pages it does not use. From here on, until [`SourceGuest::stop_free_page_hints`], pages are set in
    /// `free` that were free at some moment after this call. They may be in use again already: whoever uses one writes to it,
    /// and [`SourceGuest::collect_dirty`] tells. False if this guest cannot be asked.
    fn start_free_page_hints(&self, free: &Arc<SharedBitmap>) -> GuestResult<bool> {
        let _ = free;
        Ok(false)
    }

    /// Whether the guest has named all that it has.
    fn free_page_hints_are_over(&self) -> bool {
        true
    }

    /// When this returns, nothing is set in `free` any more, not even by what was on its way. `done`: nothing will be asked for
    /// again in this migration. Idempotent.
    fn stop_free_page_hints(&self, done: bool) -> GuestResult<()> {
        let _ = done;
        Ok(())
    }

    /// Bytes of memory that each vCPU has dirtied per second since the last [`SourceGuest::collect_dirty`] but one, judged
    /// before it wrote pages a second time; empty if they cannot be told apart.
    fn vcpu_dirty_rates(&self) -> Vec<f64> {
        Vec::new()
    }

    /// From here on holds each vCPU for this share of its time, in per cent from 0 to 99, in short periods; those not named,
    /// not at all. A held vCPU obeys `pause` at once. Nothing of this travels with the machine. False if this machine cannot
    /// be throttled.
    fn throttle(&self, percent: &[u8]) -> GuestResult<bool> {
        let _ = percent;
        Ok(false)
    }

    /// For how long each vCPU has been held since the machine was made.
    fn throttled(&self) -> Vec<Duration> {
        Vec::new()
    }

    /// What this machine cannot do as it should, and what the operator can do about it: for the report.
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }

    /// Lets devices finish what is in flight and begin nothing new, while vCPUs still run: called just before `pause`, which
    /// then has little to wait for. What is queued meanwhile waits for the resume, wherever that is.
    fn settle(&self) -> GuestResult<()> {
        Ok(())
    }

    /// Stops the machine. Idempotent.
    fn pause(&self) -> GuestResult<()>;

    /// Lets it run again. Refused while fenced.
    fn resume(&self) -> GuestResult<()>;

    /// State of everything but memory and disks; the machine is paused.
    fn save_state(&self) -> GuestResult<Vec<StatePayload>>;

    /// From now on the machine must not run here: called just before Commit is sent.
    fn fence(&self) -> GuestResult<()>;

    /// Lifts the fence, once it is certain that the destination did not and will never run the machine.
    fn unfence(&self) -> GuestResult<()>;

    /// The disks, in the order of the layout.
    fn disks(&self) -> Vec<Arc<dyn SourceDisk>>;
}

/// One disk at the source. All numbers are block numbers.
pub trait SourceDisk: Send + Sync {
    /// Starts to record blocks that the guest writes or discards. Idempotent.
    fn start_dirty_tracking(&self) -> GuestResult<()>;

    /// Stops recording.
    fn stop_dirty_tracking(&self) -> GuestResult<()>;

    /// Sets in `into` every block written since the last call, and forgets them.
    fn collect_dirty(&self, into: &mut Bitmap) -> GuestResult<()>;

    /// From here on the guest's writes to this disk are answered when what they changed has arrived at the destination, or
    /// [`HOLD_MOST`](crate::mirror::HOLD_MOST) after they were done; a machine that pauses answers them all. `bell` is rung when a
    /// write waits. False if this disk cannot do that. See [`Gate`](crate::mirror::Gate).
    fn start_mirroring(&self, bell: &Arc<Bell>) -> GuestResult<bool> {
        let _ = bell;
        Ok(false)
    }

    /// All that has been collected has arrived.
    fn mirrored(&self) {}

    /// No write waits any more. Idempotent.
    fn stop_mirroring(&self) {}

    /// The first run of blocks at or after `from` that the file system has data for (`SEEK_DATA`).
    fn next_data(&self, from: u64) -> GuestResult<Option<Range<u64>>>;

    /// A reader with a queue of its own.
    fn reader(&self) -> GuestResult<Box<dyn BlockReader>>;
}

/// Reads blocks of a disk with many requests in flight.
pub trait BlockReader: Send {
    /// How many requests may be in flight.
    fn depth(&self) -> usize;

    /// Queues a read of one block.
    fn submit(&mut self, block: u64) -> GuestResult<()>;

    /// Waits for any queued read and hands its block number and bytes to `take`. Returns false if nothing is in flight.
    fn complete(&mut self, take: &mut dyn FnMut(u64, &[u8])) -> GuestResult<bool>;
}

/// How long the parts of a resume at the destination took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeTiming {
    /// From the arrival of Commit until the first vCPU was told to run.
    pub resume: Duration,
}

/// The machine at the destination: it is built from the layout, filled, and resumed once.
pub trait DestinationGuest: Send + Sync {
    /// Checks that this host can run such a machine (CPU, devices and their versions, disks, room) and builds it, empty and
    /// not running.
    fn prepare(&self, layout: &MachineLayout) -> GuestResult<()>;

    /// Data for these pages follows within moments, some for the first time: a hint that lets memory be made ready for many at once.
    fn prepare_pages(&self, pages: Range<u64>) {
        let _ = pages;
    }

    /// Stores pages `first..`; `data` is a multiple of [`PAGE_BYTES`] and has been checked against the layout.
    fn write_pages(&self, first: u64, data: &[u8]) -> GuestResult<()>;

    /// Makes the pages read as zeroes.
    fn zero_pages(&self, pages: Range<u64>) -> GuestResult<()>;

    /// Restores everything but memory and disks. Nothing runs yet; may be called once.
    fn restore_state(&self, payloads: &[StatePayload]) -> GuestResult<()>;

    /// Runs the machine and announces its MAC addresses on its networks. Written pages are tracked from here on until
    /// [`DestinationGuest::stop_dirty_tracking`], for the sake of verification. An error means that no vCPU has run and
    /// none will: the source then takes the machine back.
    fn resume(&self) -> GuestResult<()>;

    /// Pages written since the resume, or since the last call.
    fn collect_dirty(&self, into: &mut Bitmap) -> GuestResult<()>;

    /// Ends the tracking that `resume` began.
    fn stop_dirty_tracking(&self) -> GuestResult<()>;

    /// Copies pages, for verification.
    fn read_pages(&self, first: u64, buffer: &mut [u8]) -> GuestResult<()>;

    /// The disks, in the order of the layout; valid after `prepare`.
    fn disks(&self) -> Vec<Arc<dyn DestinationDisk>>;

    /// Drops the half-built machine: the migration failed before Commit.
    fn discard(&self);

    /// Whether pages and blocks may still be missing when it resumes (post-copy); the error says why not, and what to do.
    /// Asked before anything is prepared.
    fn postcopy(&self) -> GuestResult<()> {
        Err(GuestError::new("this destination needs all memory before it can run the machine"))
    }

    /// Forgets what these pages hold: they will come again, after [`DestinationGuest::expect_pages`].
    fn forget_pages(&self, pages: &Bitmap) -> GuestResult<()> {
        let _ = pages;
        self.postcopy()
    }

    /// From here on whoever touches one of `missing`, which have been forgotten, waits until it has been filled. Called once,
    /// before `restore_state`.
    fn expect_pages(&self, missing: &Bitmap) -> GuestResult<Arc<dyn Missing>> {
        let _ = missing;
        Err(self.postcopy().err().unwrap_or_else(|| GuestError::new("this destination cannot wait for pages")))
    }

    /// Stops the running machine for good: a part of it will never arrive. `reason` is what the operator reads.
    fn lose(&self, reason: &str) {
        let _ = reason;
    }
}

/// Pages of memory or blocks of one disk that have not arrived while the guest runs already.
///
/// Whoever fills never touches what is missing by other ways than these methods: it would wait for itself.
pub trait Missing: Send + Sync {
    /// Becomes readable when the guest waits for something.
    fn ready(&self) -> BorrowedFd<'_>;

    /// Adds to `into` the numbers that the guest has begun to wait for since the last call; never blocks. A number can come
    /// more than once, and also after it was filled.
    fn wanted(&self, into: &mut Vec<u64>) -> GuestResult<()>;

    /// Stores pages or blocks from `first` on and wakes who waits for them. What is there already stays as it is, since the
    /// guest may have changed it.
    fn fill(&self, first: u64, data: &[u8]) -> GuestResult<()>;

    /// As `fill`, with zeroes.
    fn fill_zero(&self, range: Range<u64>) -> GuestResult<()>;

    /// Nothing is missing any more; blocks are on stable storage when this returns. Also called when the migration fails
    /// before Commit: whoever waits then goes on, with whatever is there.
    fn finish(&self) -> GuestResult<()>;
}

/// One disk at the destination.
pub trait DestinationDisk: Send + Sync {
    /// A writer with a queue of its own.
    fn writer(&self) -> GuestResult<Box<dyn BlockWriter>>;

    /// A reader, for verification.
    fn reader(&self) -> GuestResult<Box<dyn BlockReader>>;

    /// Blocks that the guest wrote since the resume.
    fn collect_dirty(&self, into: &mut Bitmap) -> GuestResult<()>;

    /// Ends the tracking that the resume began.
    fn stop_dirty_tracking(&self) -> GuestResult<()>;

    /// From here on the guest's requests for one of `missing` wait until it has been filled.
    fn expect_blocks(&self, missing: &Bitmap) -> GuestResult<Arc<dyn Missing>> {
        let _ = missing;
        Err(GuestError::new("this disk cannot wait for blocks"))
    }
}

/// Writes blocks of a disk with many requests in flight.
pub trait BlockWriter: Send {
    /// Queues a write of one block. Waits for an earlier write only if the queue is full.
    fn write(&mut self, block: u64, data: &[u8]) -> GuestResult<()>;

    /// Makes the blocks read as zeroes and gives their space back.
    fn zero(&mut self, blocks: Range<u64>) -> GuestResult<()>;

    /// Waits for every queued write; with `durable`, also until they are on stable storage.
    fn flush(&mut self, durable: bool) -> GuestResult<()>;
}
