//! Tests of images and of their copying, on real files and a real io_uring.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use migration::guest::{BLOCK_BYTES, DestinationDisk, SourceDisk};
use migration::page::Bitmap;
use tempfile::TempDir;

use super::{DiskError, Purpose, RawDisk};
use crate::config::{DiskConfig, DiskSource};

fn config(path: &Path) -> DiskConfig {
    DiskConfig { id: "disk0".into(), source: DiskSource::Path(path.into()), read_only: false, shared: false }
}

fn make(directory: &TempDir, name: &str, bytes: u64) -> DiskConfig {
    let path = directory.path().join(name);
    File::create(&path).unwrap().set_len(bytes).unwrap();
    config(&path)
}

fn path(config: &DiskConfig) -> &Path {
    match &config.source {
        DiskSource::Path(path) => path,
        DiskSource::Fd(_) => unreachable!("tests open paths"),
    }
}

/// Copies the blocks in `todo` with full queues.
fn copy(source: &RawDisk, destination: &RawDisk, todo: &Bitmap) {
    let mut reader = SourceDisk::reader(source).unwrap();
    let mut writer = destination.writer().unwrap();
    let mut queued = 0;
    let mut from = 0;
    let mut take = |block: u64, data: &[u8]| {
        if data.iter().all(|&byte| byte == 0) {
            writer.zero(block..block + 1).unwrap();
        } else {
            writer.write(block, data).unwrap();
        }
    };
    while let Some(run) = todo.next_run(from, 1) {
        from = run.end;
        if queued == reader.depth() {
            assert!(reader.complete(&mut take).unwrap());
            queued -= 1;
        }
        reader.submit(run.start).unwrap();
        queued += 1;
    }
    while reader.complete(&mut take).unwrap() {}
    writer.flush(true).unwrap();
}

fn data_blocks(disk: &RawDisk) -> Bitmap {
    let mut todo = Bitmap::new(disk.layout().blocks());
    let mut from = 0;
    while let Some(run) = disk.next_data(from).unwrap() {
        todo.insert_range(run.clone());
        from = run.end;
    }
    todo
}

#[test]
fn each_bad_image_has_its_error() {
    let directory = TempDir::new().unwrap();
    let missing = RawDisk::open(&config(&directory.path().join("none")), Purpose::Use).unwrap_err();
    assert!(matches!(missing, DiskError::Missing { .. }) && missing.to_string().contains("truncate -s"), "{missing}");
    let odd = RawDisk::open(&make(&directory, "odd", 1000), Purpose::Use).unwrap_err();
    assert!(matches!(odd, DiskError::Size { bytes: 1000, .. }), "{odd}");
    let empty = RawDisk::open(&make(&directory, "empty", 0), Purpose::Use).unwrap_err();
    assert!(matches!(empty, DiskError::Size { bytes: 0, .. }), "{empty}");
    let folder = RawDisk::open(&config(directory.path()), Purpose::Use).unwrap_err();
    assert!(matches!(folder, DiskError::Kind { .. }), "{folder}");
    let pipe = RawDisk::open(&config(Path::new("/dev/null")), Purpose::Use).unwrap_err();
    assert!(matches!(pipe, DiskError::Kind { .. }), "{pipe}");
}

#[test]
fn one_image_has_one_writer_or_many_readers() {
    let directory = TempDir::new().unwrap();
    let config = make(&directory, "a", 4096);
    let read_only = DiskConfig { read_only: true, ..config.clone() };
    let writer = RawDisk::open(&config, Purpose::Use).unwrap();
    for other in [&config, &read_only] {
        let refused = RawDisk::open(other, Purpose::Use).unwrap_err();
        assert!(matches!(refused, DiskError::Locked { .. }), "{refused}");
        assert!(refused.to_string().contains(path(&config).to_str().unwrap()), "{refused}");
    }
    drop(writer);
    let first = RawDisk::open(&read_only, Purpose::Use).unwrap();
    let second = RawDisk::open(&read_only, Purpose::Use).unwrap();
    assert!(matches!(RawDisk::open(&config, Purpose::Use), Err(DiskError::Locked { .. })));
    assert!(first.writer().is_err() && second.layout().read_only);
}

#[test]
fn an_inherited_descriptor_is_checked() {
    let directory = TempDir::new().unwrap();
    let path = path(&make(&directory, "a", 8192)).to_owned();
    let by_fd = |fd, read_only| DiskConfig { id: "d".into(), source: DiskSource::Fd(fd), read_only, shared: false };
    let file = File::options().read(true).write(true).open(&path).unwrap();
    assert_eq!(RawDisk::open(&by_fd(file.as_raw_fd(), false), Purpose::Use).unwrap().layout().bytes, 8192);
    drop(file);
    let file = File::open(&path).unwrap();
    assert!(matches!(RawDisk::open(&by_fd(file.as_raw_fd(), false), Purpose::Use), Err(DiskError::Descriptor { .. })));
    RawDisk::open(&by_fd(file.as_raw_fd(), true), Purpose::Use).unwrap();
    assert!(matches!(
        RawDisk::open(&by_fd(987_654, false), Purpose::Use),
        Err(DiskError::Descriptor { fd: 987_654, .. })
    ));
    assert!(matches!(RawDisk::open(&by_fd(-1, false), Purpose::Use), Err(DiskError::Descriptor { .. })));
}

#[test]
fn sparse_stays_sparse_and_the_short_last_block_travels() {
    let directory = TempDir::new().unwrap();
    let bytes = 100 * BLOCK_BYTES + 1536;
    let (from, to) = (make(&directory, "from", bytes), make(&directory, "to", bytes));
    let file = File::options().write(true).open(path(&from)).unwrap();
    file.write_all_at(&[7; 5000], 3 * BLOCK_BYTES + 100).unwrap();
    file.write_all_at(&[9; 1536], 100 * BLOCK_BYTES).unwrap();
    file.sync_all().unwrap();
    let (source, destination) =
        (RawDisk::open(&from, Purpose::Use).unwrap(), RawDisk::open(&to, Purpose::Use).unwrap());
    let todo = data_blocks(&source);
    assert!(todo.contains(3) && todo.contains(100) && todo.count() < 10, "{} blocks", todo.count());
    copy(&source, &destination, &todo);
    assert!(std::fs::read(path(&from)).unwrap() == std::fs::read(path(&to)).unwrap());
    let allocated = std::fs::metadata(path(&to)).unwrap().blocks() * 512;
    assert!(allocated <= 4 * BLOCK_BYTES, "{allocated} bytes allocated");
    // Zeroing gives space back.
    let mut writer = destination.writer().unwrap();
    writer.zero(0..101).unwrap();
    writer.flush(true).unwrap();
    // But for the file system's last page, of which the disk covers only a part.
    assert!(std::fs::metadata(path(&to)).unwrap().blocks() <= 8);
    assert!(std::fs::read(path(&to)).unwrap().iter().all(|&byte| byte == 0));
    assert!(writer.zero(0..102).is_err());
    assert!(writer.write(100, &[0; 512]).is_err() && writer.write(101, &[0; 512]).is_err());
    assert!(SourceDisk::reader(&source).unwrap().submit(101).is_err());
}

#[test]
fn writes_of_one_block_land_in_order() {
    let directory = TempDir::new().unwrap();
    let config = make(&directory, "a", 2 * BLOCK_BYTES);
    let disk = RawDisk::open(&config, Purpose::Use).unwrap();
    let mut writer = disk.writer().unwrap();
    for round in 1..=100u8 {
        writer.write(0, &vec![round; BLOCK_BYTES as usize]).unwrap();
        writer.write(1, &vec![round; BLOCK_BYTES as usize]).unwrap();
        if round % 10 == 0 {
            writer.zero(1..2).unwrap();
        }
    }
    drop(writer);
    let content = std::fs::read(path(&config)).unwrap();
    assert!(content[..BLOCK_BYTES as usize].iter().all(|&byte| byte == 100));
    assert!(content[BLOCK_BYTES as usize..].iter().all(|&byte| byte == 0));
}

#[test]
fn a_copy_under_writes_converges_to_the_same_bytes() {
    let directory = TempDir::new().unwrap();
    let blocks = 64;
    let (from, to) = (make(&directory, "from", blocks * BLOCK_BYTES), make(&directory, "to", blocks * BLOCK_BYTES));
    let (source, destination) =
        (Arc::new(RawDisk::open(&from, Purpose::Use).unwrap()), RawDisk::open(&to, Purpose::Use).unwrap());
    source.start_dirty_tracking();
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (source, stop) = (Arc::clone(&source), Arc::clone(&stop));
        let file = File::options().write(true).open(path(&from)).unwrap();
        std::thread::spawn(move || {
            let mut state = 88_172_645_463_325_252u64;
            while !stop.load(Ordering::SeqCst) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let offset = state % (blocks * BLOCK_BYTES / 512) * 512;
                source.tracker().mark(offset, 512);
                file.write_all_at(&[(state >> 32) as u8; 512], offset).unwrap();
                source.tracker().mark(offset, 512);
            }
        })
    };
    copy(&source, &destination, &Bitmap::full(blocks));
    for round in 0..6 {
        if round == 5 {
            stop.store(true, Ordering::SeqCst);
        }
        let mut dirty = Bitmap::new(blocks);
        if round == 5 {
            while !writer.is_finished() {
                std::thread::yield_now();
            }
        }
        SourceDisk::collect_dirty(&*source, &mut dirty).unwrap();
        copy(&source, &destination, &dirty);
    }
    writer.join().unwrap();
    assert!(std::fs::read(path(&from)).unwrap() == std::fs::read(path(&to)).unwrap());
}

#[test]
fn a_file_that_cannot_be_direct_is_served_through_the_page_cache() {
    let Ok(directory) = TempDir::new_in("/dev/shm") else {
        println!("skipped: no /dev/shm");
        return;
    };
    let config = make(&directory, "a", 3 * BLOCK_BYTES);
    File::options().write(true).open(path(&config)).unwrap().write_all(b"hello").unwrap();
    let disk = RawDisk::open(&config, Purpose::Use).unwrap();
    let mut reader = SourceDisk::reader(&disk).unwrap();
    reader.submit(0).unwrap();
    assert!(reader.complete(&mut |block, data| assert!(block == 0 && data.starts_with(b"hello\0"))).unwrap());
    assert!(!reader.complete(&mut |_, _| ()).unwrap());
}
