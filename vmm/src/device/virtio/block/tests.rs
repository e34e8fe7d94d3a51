//! A driver against the real device: real image files, a real io_uring, a guest memory of the test's own.

mod device;
mod late;
mod mirrored;
mod resized;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use migration::guest::{BLOCK_BYTES, DestinationDisk, SourceDisk, StatePayload};
use migration::page::Bitmap;
use tempfile::TempDir;

use super::{Block, QUEUE_SIZE, feature};
use crate::config::{DiskConfig, DiskSource};
use crate::device::virtio::feature as common;
use crate::device::virtio::testing::{Board, DATA, Driver};
use crate::device::{Device, DeviceError, StateError};
use crate::disk::{Purpose, RawDisk};

const DISK_BYTES: u64 = 8 << 20;
const ALL: u64 = common::COMMON | feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES;
/// Header, status and data of a request in guest memory.
const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1_0000;

struct Rig {
    _directory: TempDir,
    path: PathBuf,
    block: Block,
    driver: Driver,
}

fn disk(path: &std::path::Path, read_only: bool) -> Arc<RawDisk> {
    let source = DiskSource::Path(path.to_owned());
    Arc::new(RawDisk::open(&DiskConfig { id: "disk0".into(), source, read_only, shared: false }, Purpose::Use).unwrap())
}

fn image(directory: &TempDir) -> PathBuf {
    let path = directory.path().join("image");
    File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
    path
}

impl Rig {
    fn new(features: u64) -> Self {
        Self::with(features, TempDir::new().unwrap(), false)
    }

    fn with(features: u64, directory: TempDir, read_only: bool) -> Self {
        let path = image(&directory);
        let disk = disk(&path, read_only);
        Self::over(features, directory, path, disk)
    }

    fn over(features: u64, directory: TempDir, path: PathBuf, disk: Arc<RawDisk>) -> Self {
        let board = Board::new(1);
        let block = Block::new(disk, board.wiring()).unwrap();
        let mut driver = Driver::new(board, block.transport(), QUEUE_SIZE);
        driver.start(features);
        Self { _directory: directory, path, block, driver }
    }

    /// The same driver over a device that was made of this state.
    fn restored(self, state: &StatePayload) -> Self {
        let Self { _directory, path, block, driver: Driver { board, queues, transport } } = self;
        drop((transport, block));
        let board = Board::with_ram(board.ram, 1);
        let block = Block::restore(disk(&path, false), board.wiring(), state).unwrap();
        let driver = Driver { transport: block.transport(), board, queues };
        Self { _directory, path, block, driver }
    }

    /// Queues a request with its header and status at slot `slot`.
    fn queue(&mut self, slot: u64, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u16 {
        let (header, status) = (HEADER + slot * 0x200, STATUS + slot * 0x200);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.put(header, &bytes);
        self.driver.put(status, &[0xff]);
        let mut parts = vec![(header, 16, false)];
        parts.extend(data);
        parts.push((status, 1, true));
        self.driver.queues[0].add(&self.driver.board.ram, &parts)
    }

    /// Carries one request out: (status, bytes written according to the used ring).
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        let head = self.queue(0, kind, sector, data);
        self.driver.kick(0);
        let (used, written) = self.driver.wait_used(0);
        assert_eq!(used, head);
        (self.driver.get(STATUS, 1)[0], written)
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.driver.put(BUFFER, bytes);
        self.request(1, sector, &[(BUFFER, bytes.len() as u32, false)]).0
    }

    fn content(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut content = vec![0; bytes];
        File::open(&self.path).unwrap().read_exact_at(&mut content, offset).unwrap();
        content
    }

    fn collect(&self) -> Vec<u64> {
        let mut dirty = Bitmap::new(DISK_BYTES / BLOCK_BYTES);
        self.block.disk().tracker().collect(&mut dirty);
        (0..dirty.len()).filter(|&block| dirty.contains(block)).collect()
    }
}

fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|index| (index / 512) as u8 ^ (index as u8) ^ seed).collect()
}

#[test]
fn writes_reach_the_file_and_reads_bring_them_back() {
    let mut rig = Rig::new(ALL);
    let data = pattern(12288, 3);
    assert_eq!(rig.write(8, &data), 0);
    assert_eq!(rig.request(4, 0, &[]), (0, 1));
    assert!(rig.content(4096, data.len()) == data);
    // Scattered over segments of unequal, unaligned kind.
    let parts = [(BUFFER + 0x8001, 1000, true), (BUFFER + 0x9000, 11000, true), (BUFFER + 0xc003, 288, true)];
    assert_eq!(rig.request(0, 8, &parts), (0, 12289));
    let mut back = rig.driver.get(BUFFER + 0x8001, 1000);
    back.extend(rig.driver.get(BUFFER + 0x9000, 11000));
    back.extend(rig.driver.get(BUFFER + 0xc003, 288));
    assert!(back == data);
    let counters = rig.block.counters();
    assert_eq!(counters.read_bytes.load(Ordering::Relaxed), 12288);
    assert_eq!(counters.write_bytes.load(Ordering::Relaxed), 12288);
    assert_eq!(counters.requests.load(Ordering::Relaxed), 3);
}

#[test]
fn large_unaligned_requests_pass_through_bounce_buffers_in_pieces() {
    let mut rig = Rig::new(ALL);
    let data = pattern(1 << 20, 9);
    rig.driver.put(BUFFER + 7, &data);
    assert_eq!(rig.request(1, 16, &[(BUFFER + 7, 1 << 20, false)]).0, 0);
    assert!(rig.content(8192, data.len()) == data);
    rig.driver.put(BUFFER + 7, &vec![0; 1 << 20]);
    assert_eq!(rig.request(0, 16, &[(BUFFER + 3, 1 << 20, true)]), (0, (1 << 20) + 1));
    assert!(rig.driver.get(BUFFER + 3, 1 << 20) == data);
    // More at once than there are bounce buffers, interleaved with aligned ones.
    for slot in 0..40u64 {
        let at = BUFFER + slot * 0x8000 + u64::from(slot % 3 != 0);
        rig.driver.put(at, &pattern(4096, slot as u8));
        rig.queue(slot, 1, 4096 + slot * 8, &[(at, 4096, false)]);
    }
    rig.driver.kick(0);
    for _ in 0..40 {
        rig.driver.wait_used(0);
    }
    for slot in 0..40u64 {
        assert_eq!(rig.driver.get(STATUS + slot * 0x200, 1), [0]);
        assert!(rig.content((4096 + slot * 8) * 512, 4096) == pattern(4096, slot as u8), "slot {slot}");
    }
}

#[test]
fn a_file_in_the_page_cache_and_one_without_event_index_work_as_well() {
    let Ok(directory) = TempDir::new_in("/dev/shm") else {
        println!("skipped: no /dev/shm");
        return;
    };
    let mut rig = Rig::with(common::VERSION_1, directory, false);
    assert_eq!(rig.write(1, &pattern(512, 1)), 0);
    assert_eq!(rig.request(0, 0, &[(BUFFER, 1024, true)]), (0, 1025));
    assert!(rig.driver.get(BUFFER + 512, 512) == pattern(512, 1));
    assert_eq!(rig.request(13, 0, &[]).0, 1);
}

#[test]
fn discard_and_write_zeroes_free_space_and_read_as_zeroes() {
    let mut rig = Rig::new(ALL);
    for block in 0..4 {
        assert_eq!(rig.write(block * 128, &pattern(65536, 5)), 0);
    }
    assert_eq!(rig.request(4, 0, &[]).0, 0);
    let before = std::fs::metadata(&rig.path).unwrap().blocks();
    let range = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    rig.block.disk().start_dirty_tracking();
    rig.driver.put(BUFFER, &[range(0, 128, 0), range(256, 128, 0)].concat());
    assert_eq!(rig.request(11, 0, &[(BUFFER, 32, false)]).0, 0);
    assert_eq!(rig.collect(), [0, 2]);
    assert!(std::fs::metadata(&rig.path).unwrap().blocks() <= before - 256);
    rig.driver.put(BUFFER, &range(129, 3, 0));
    assert_eq!(rig.request(13, 0, &[(BUFFER, 16, false)]).0, 0);
    rig.driver.put(BUFFER, &range(384, 128, 1));
    assert_eq!(rig.request(13, 0, &[(BUFFER, 16, false)]).0, 0);
    assert_eq!(rig.collect(), [1, 3]);
    let mut expected = vec![0; 4 * 65536];
    expected[65536..131_072].copy_from_slice(&pattern(65536, 5));
    expected[129 * 512..132 * 512].fill(0);
    assert!(rig.content(0, expected.len()) == expected);
    // Reserved flags, ranges past the end, and too many of them.
    for (kind, bytes, status) in [
        (11, range(0, 8, 1), 2),
        (13, range(0, 8, 2), 2),
        (11, range(DISK_BYTES / 512 - 1, 2, 0), 1),
        (13, range(u64::MAX, 8, 0), 1),
        (11, vec![0; 17 * 16], 1),
        (13, vec![0; 15], 1),
    ] {
        rig.driver.put(BUFFER, &bytes);
        assert_eq!(rig.request(kind, 0, &[(BUFFER, bytes.len() as u32, false)]).0, status, "{kind} {bytes:?}");
    }
}

#[test]
fn identity_unknown_requests_and_limits() {
    let mut rig = Rig::new(ALL);
    assert_eq!(rig.request(8, 0, &[(BUFFER, 20, true)]), (0, 21));
    assert!(rig.driver.get(BUFFER, 20).starts_with(b"disk0\0\0"));
    assert_eq!(rig.request(77, 0, &[]).0, 2);
    let end = DISK_BYTES / 512;
    assert_eq!(rig.request(0, end - 1, &[(BUFFER, 512, true)]).0, 0);
    assert_eq!(rig.request(0, end, &[(BUFFER, 512, true)]).0, 1);
    assert_eq!(rig.request(1, end - 1, &[(BUFFER, 1024, false)]).0, 1);
    assert_eq!(rig.request(0, u64::MAX, &[(BUFFER, 512, true)]).0, 1);
    assert_eq!(rig.request(0, 0, &[(BUFFER, 511, true)]).0, 1);
}

#[test]
fn a_read_only_disk_refuses_to_change() {
    let mut rig = Rig::with(common::COMMON | feature::RO, TempDir::new().unwrap(), true);
    assert_eq!(rig.driver.offered() & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    assert_eq!(rig.write(0, &[1; 512]), 1);
    rig.driver.put(BUFFER, &[0; 16]);
    assert_eq!(rig.request(11, 0, &[(BUFFER, 16, false)]).0, 1);
    assert_eq!(rig.request(13, 0, &[(BUFFER, 16, false)]).0, 1);
    assert_eq!(rig.request(0, 0, &[(BUFFER, 512, true)]).0, 0);
    assert!(rig.content(0, 4096).iter().all(|&byte| byte == 0));
}

#[test]
fn reads_mark_pages_and_writes_mark_blocks() {
    let mut rig = Rig::new(ALL);
    rig.block.disk().start_dirty_tracking();
    assert_eq!(rig.write(127, &pattern(1024, 1)), 0);
    assert_eq!(rig.collect(), [0, 1]);
    assert_eq!(rig.collect(), [0u64; 0]);
    for page in [BUFFER, BUFFER + 4096, BUFFER + 8192, BUFFER + 12288] {
        rig.driver.board.take_dirty(page);
    }
    assert_eq!(rig.request(0, 127, &[(BUFFER + 4096, 8192, true)]).0, 0);
    assert_eq!(rig.collect(), [0u64; 0]);
    let dirty: Vec<bool> = (0..4).map(|page| rig.driver.board.take_dirty(BUFFER + page * 4096)).collect();
    assert_eq!(dirty, [false, true, true, false]);
    assert!(rig.driver.board.take_dirty(STATUS) && rig.driver.board.take_dirty(rig.driver.queues[0].used_ring()));
}

#[test]
fn a_pause_finishes_what_is_in_flight_and_takes_nothing_more() {
    let mut rig = Rig::new(ALL);
    for slot in 0..60u64 {
        rig.driver.put(BUFFER + slot * 65536, &pattern(65536, slot as u8));
        rig.queue(slot, 1, slot * 128, &[(BUFFER + slot * 65536, 65536, false)]);
    }
    rig.driver.kick(0);
    rig.block.pause().unwrap();
    rig.block.pause().unwrap();
    let mut answered = 0;
    while rig.driver.queues[0].used(&rig.driver.board.ram).is_some() {
        answered += 1;
    }
    let interrupts = rig.driver.read(0x60);
    rig.driver.write(0x64, interrupts);
    let state = rig.block.save().unwrap();
    rig.queue(60, 1, 0, &[(BUFFER, 512, false)]);
    rig.driver.kick(0);
    assert!(rig.driver.try_wait_used(0, Duration::from_millis(100)).is_none(), "answered while paused");
    assert_eq!(rig.block.save().unwrap(), state);
    rig.block.resume().unwrap();
    for _ in answered..61 {
        rig.driver.wait_used(0);
    }
    assert!(matches!(rig.block.save(), Err(DeviceError::NotPaused { .. })));
}

#[test]
fn a_settled_device_lets_the_guest_queue_and_even_reset() {
    let mut rig = Rig::new(ALL);
    rig.block.settle().unwrap();
    rig.queue(0, 1, 0, &[(BUFFER, 512, false)]);
    rig.driver.kick(0);
    assert!(rig.driver.try_wait_used(0, Duration::from_millis(50)).is_none());
    assert!(matches!(rig.block.save(), Err(DeviceError::NotPaused { .. })));
    rig.block.resume().unwrap();
    rig.driver.wait_used(0);
    rig.block.settle().unwrap();
    rig.driver.start(ALL);
    rig.queue(0, 1, 0, &[(BUFFER, 512, false)]);
    rig.driver.kick(0);
    rig.block.pause().unwrap();
    assert!(rig.driver.queues[0].used(&rig.driver.board.ram).is_none());
    rig.block.resume().unwrap();
    rig.driver.wait_used(0);
}

#[test]
fn a_saved_device_goes_on_over_the_same_memory() {
    let mut rig = Rig::new(ALL);
    for sector in 0..300u64 {
        assert_eq!(rig.write(sector, &pattern(512, sector as u8)), 0);
    }
    rig.block.pause().unwrap();
    // Queued but not taken: its notification is lost with the source.
    let head = rig.queue(1, 0, 299, &[(BUFFER, 512, true)]);
    let state = rig.block.save().unwrap();
    let mut rig = rig.restored(&state);
    assert_eq!(rig.driver.read(0x70), 15);
    assert!(rig.driver.try_wait_used(0, Duration::from_millis(50)).is_none(), "a restored device is paused");
    assert_eq!(rig.block.save().unwrap(), state);
    rig.block.resume().unwrap();
    assert_eq!(rig.driver.wait_used(0), (head, 513));
    assert!(rig.driver.get(BUFFER, 512) == pattern(512, 299u64 as u8));
    assert_eq!(rig.write(1, &pattern(512, 1)), 0);
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let rig = Rig::new(ALL);
    rig.block.pause().unwrap();
    let state = rig.block.save().unwrap();
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("other");
    File::create(&path).unwrap().set_len(DISK_BYTES / 2).unwrap();
    let board = Board::new(1);
    let refused = Block::restore(disk(&path, false), board.wiring(), &state);
    assert!(matches!(refused, Err(DeviceError::State(StateError::Unfit { .. }))));
    let path = image(&directory);
    for cut in 0..state.bytes.len() {
        let cut = StatePayload { bytes: state.bytes[..cut].to_vec(), ..state.clone() };
        assert!(Block::restore(disk(&path, false), board.wiring(), &cut).is_err());
    }
}

#[test]
fn a_reset_in_the_middle_leaves_a_device_that_can_be_started_again() {
    let mut rig = Rig::new(ALL);
    for round in 0..5u8 {
        for slot in 0..50u64 {
            rig.queue(slot, 1, slot * 8, &[(BUFFER, 4096, false)]);
        }
        rig.driver.kick(0);
        rig.driver.start(ALL);
        assert_eq!(rig.write(0, &pattern(512, round)), 0);
        assert!(rig.content(0, 512) == pattern(512, round));
    }
}

/// Pages of the image in the page cache that a power cut would lose; `None` where the kernel cannot tell (before 6.5).
fn unwritten_pages(path: &std::path::Path) -> Option<u64> {
    #[repr(C)]
    #[derive(Default)]
    struct Cached {
        pages: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    const SYS_CACHESTAT: libc::c_long = 451;
    let file = File::open(path).unwrap();
    let (range, mut cached) = ([0u64, 0], Cached::default());
    // SAFETY: a range of offset and length (0 is all) is read, five integers are written (cachestat(2)).
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), &raw mut cached, 0) };
    (result == 0).then_some(cached.dirty + cached.writeback)
}

#[test]
fn what_was_flushed_survives_a_power_cut() {
    let rig = |features| {
        let directory = TempDir::new().unwrap();
        let path = image(&directory);
        let config =
            DiskConfig { id: "disk0".into(), source: DiskSource::Path(path.clone()), read_only: false, shared: false };
        let disk = Arc::new(RawDisk::open_cached(&config).unwrap());
        Rig::over(features, directory, path, disk)
    };
    let mut flushing = rig(ALL);
    assert_eq!(flushing.write(0, &pattern(1 << 20, 1)), 0);
    match unwritten_pages(&flushing.path) {
        None => println!("skipped: this kernel has no cachestat"),
        Some(0) => println!("skipped: this file system wrote the data at once"),
        Some(_) => {
            assert_eq!(flushing.request(4, 0, &[]).0, 0);
            assert_eq!(unwritten_pages(&flushing.path), Some(0));
            // A driver that cannot flush gets each write on stable storage.
            let mut through = rig(common::COMMON);
            assert_eq!(through.write(0, &pattern(1 << 20, 1)), 0);
            assert_eq!(unwritten_pages(&through.path), Some(0));
        }
    }
}

#[test]
fn a_copy_under_the_guests_writes_ends_equal() {
    let mut rig = Rig::new(ALL);
    let target = rig.path.with_file_name("target");
    File::create(&target).unwrap().set_len(DISK_BYTES).unwrap();
    let destination = disk(&target, false);
    let source = Arc::clone(rig.block.disk());
    let blocks = source.layout().blocks();
    let (mut reader, mut writer) = (SourceDisk::reader(&*source).unwrap(), destination.writer().unwrap());
    let mut collect_and_copy = || {
        let (mut dirty, mut from) = (Bitmap::new(blocks), 0);
        SourceDisk::collect_dirty(&*source, &mut dirty).unwrap();
        while let Some(run) = dirty.next_run(from, reader.depth() as u64) {
            run.clone().for_each(|block| reader.submit(block).unwrap());
            from = run.end;
            while reader.complete(&mut |block, data| writer.write(block, data).unwrap()).unwrap() {}
        }
        writer.flush(false).unwrap();
    };
    rig.block.disk().start_dirty_tracking();
    for round in 0..40u8 {
        // Long requests, so that blocks are collected and copied while they are in flight; one of them zeroes.
        let writing = Arc::new(AtomicBool::new(true));
        let guest = {
            let writing = Arc::clone(&writing);
            std::thread::spawn(move || {
                let range = [&0u64.to_le_bytes()[..], &2048u32.to_le_bytes(), &[1, 0, 0, 0]].concat();
                rig.driver.put(BUFFER, &range);
                rig.queue(0, 13, 0, &[(BUFFER, 16, false)]);
                for slot in 1..8u64 {
                    let at = BUFFER + (slot << 20);
                    rig.driver.put(at, &pattern(1 << 20, round.wrapping_add(slot as u8)));
                    rig.queue(slot, 1, slot * 2048, &[(at, 1 << 20, false)]);
                }
                rig.driver.kick(0);
                for _ in 0..8 {
                    rig.driver.wait_used(0);
                }
                rig.write(7, &pattern(4096, round));
                writing.store(false, Ordering::SeqCst);
                rig
            })
        };
        while writing.load(Ordering::SeqCst) {
            collect_and_copy();
        }
        rig = guest.join().unwrap();
        rig.block.pause().unwrap();
        collect_and_copy();
        assert!(std::fs::read(&rig.path).unwrap() == std::fs::read(&target).unwrap(), "round {round}");
        rig.block.resume().unwrap();
    }
}
