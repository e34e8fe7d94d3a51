//! A disk that can become full, for tests.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use redb::{Database, StorageBackend};

use super::{Store, StoreError};

/// A file on a disk that can become full.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    bytes: Arc<Mutex<Vec<u8>>>,
    full: Arc<AtomicBool>,
}

impl Disk {
    /// From here on nothing more can be written.
    pub(crate) fn fill(&self) {
        self.full.store(true, Ordering::SeqCst);
    }

    /// It can again.
    pub(crate) fn make_room(&self) {
        self.full.store(false, Ordering::SeqCst);
    }

    /// Opens the database on it.
    pub(super) fn opener(&self) -> impl Fn() -> Result<Database, StoreError> + Send + Sync + use<> {
        let disk = self.clone();
        move || Ok(Database::builder().create_with_backend(disk.clone())?)
    }

    fn room(&self) -> io::Result<()> {
        if self.full.load(Ordering::SeqCst) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (bytes, start) = (self.bytes.lock().unwrap(), offset as usize);
        out.copy_from_slice(&bytes[start..start + out.len()]);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.room()?;
        self.bytes.lock().unwrap().resize(length as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.room()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.room()?;
        let start = offset as usize;
        self.bytes.lock().unwrap()[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }
}

/// A store on `disk`, which is opened again at once after a failure.
pub(crate) fn store(disk: &Disk) -> Store {
    Store::opened(disk.opener(), Duration::ZERO).unwrap()
}
