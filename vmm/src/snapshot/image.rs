//! The `memory` file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use migration::guest::PAGE_BYTES;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::{SnapshotError, file_error};
use crate::memory::Memory;

/// Pages copied at once.
const CHUNK_PAGES: u64 = 256;

/// What the memory of a snapshot must hold.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Summary {
    /// Pages of the machine.
    pub pages: u64,
    /// Pages with anything but zeroes.
    pub data_pages: u64,
    /// XXH3-64 over number and contents of these, ascending.
    pub hash: u64,
}

#[derive(Default)]
struct Digest {
    hash: Xxh3,
    pages: u64,
}

impl Digest {
    /// Adds a page; false if it is all zeroes and does not count.
    fn add(&mut self, number: u64, page: &[u8]) -> bool {
        let counts = page.iter().any(|&byte| byte != 0);
        if counts {
            self.hash.update(&number.to_le_bytes());
            self.hash.update(page);
            self.pages += 1;
        }
        counts
    }

    fn summary(&self, pages: u64) -> Summary {
        Summary { pages, data_pages: self.pages, hash: self.hash.digest() }
    }
}

pub(super) fn write(memory: &Memory, path: &Path) -> Result<Summary, SnapshotError> {
    let file = File::create_new(path).map_err(file_error("create", path))?;
    file.set_len(memory.bytes()).map_err(file_error("size", path))?;
    let mut digest = Digest::default();
    let mut buffer = vec![0; (CHUNK_PAGES * PAGE_BYTES) as usize];
    let mut from = 0;
    while let Some(run) = memory.next_populated(from)? {
        let count = (run.end - run.start).min(CHUNK_PAGES);
        let part = &mut buffer[..(count * PAGE_BYTES) as usize];
        memory.read_pages(run.start, part)?;
        for (number, page) in (run.start..).zip(part.chunks(PAGE_BYTES as usize)) {
            if digest.add(number, page) {
                file.write_all_at(page, number * PAGE_BYTES).map_err(file_error("write", path))?;
            }
        }
        from = run.start + count;
    }
    file.sync_all().map_err(file_error("write", path))?;
    Ok(digest.summary(memory.pages()))
}

/// Fills memory from the file and checks that it is what was written.
pub(super) fn read(memory: &Memory, path: &Path, expected: &Summary) -> Result<(), SnapshotError> {
    let damaged = |what: String| SnapshotError::Damaged { path: path.to_owned(), what };
    let file = File::open(path).map_err(file_error("open", path))?;
    let length = file.metadata().map_err(file_error("open", path))?.len();
    if length != memory.bytes() || expected.pages != memory.pages() {
        return Err(damaged(format!("it has {length} bytes, the machine {}", memory.bytes())));
    }
    let mut digest = Digest::default();
    let mut buffer = vec![0; (CHUNK_PAGES * PAGE_BYTES) as usize];
    let mut from = 0;
    while let Some(start) = next_data(&file, from).map_err(file_error("read", path))? {
        let count = (memory.pages() - start).min(CHUNK_PAGES);
        let part = &mut buffer[..(count * PAGE_BYTES) as usize];
        file.read_exact_at(part, start * PAGE_BYTES).map_err(file_error("read", path))?;
        memory.prepare_pages(start..start + count);
        for (number, page) in (start..).zip(part.chunks(PAGE_BYTES as usize)) {
            if digest.add(number, page) {
                memory.write_pages(number, page)?;
            }
        }
        from = start + count;
    }
    memory.arrived();
    if digest.summary(expected.pages) == *expected { Ok(()) } else { Err(damaged("its checksum is wrong".into())) }
}

/// The page that the next data of the file is in.
fn next_data(file: &File, page: u64) -> std::io::Result<Option<u64>> {
    use nix::unistd::{Whence, lseek};
    match lseek(file, (page * PAGE_BYTES).cast_signed(), Whence::SeekData) {
        Ok(offset) => Ok(Some(offset.cast_unsigned() / PAGE_BYTES)),
        Err(nix::Error::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_and_zeroes_take_no_room() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        let memory = Memory::new(16).unwrap();
        memory.write_pages(3, &[5; PAGE_BYTES as usize]).unwrap();
        memory.write_pages(700, &[0; PAGE_BYTES as usize]).unwrap();
        memory.write_pages(4095, &[6; PAGE_BYTES as usize]).unwrap();
        let summary = write(&memory, &path).unwrap();
        assert_eq!((summary.pages, summary.data_pages), (4096, 2));

        let copy = Memory::new(16).unwrap();
        read(&copy, &path, &summary).unwrap();
        let mut page = [0; PAGE_BYTES as usize];
        copy.read_pages(4095, &mut page).unwrap();
        assert_eq!(page, [6; PAGE_BYTES as usize]);
        // At most a huge page for each of the two; the zeroes of page 700 are in neither.
        assert!(copy.usage().ram_bytes <= 4 << 20);

        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[1], 3 * PAGE_BYTES + 9).unwrap();
        let error = read(&Memory::new(16).unwrap(), &path, &summary).unwrap_err();
        assert!(error.to_string().contains("checksum"), "{error}");
        assert!(read(&Memory::new(17).unwrap(), &path, &summary).is_err());
    }
}
