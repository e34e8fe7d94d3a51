//! The open database, and what becomes of it once reading or writing has failed.
//!
//! redb does nothing more after such an error until the database is closed and opened again, which repairs it. The file is on the
//! file system of the disks: a guest that fills its own can make that full for a while, and the daemon must know its machines again
//! when it is not, without a restart.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use redb::Database;

use super::StoreError;

/// Between a failure and the first attempt to open the database again, and between two attempts: a repair reads all of it.
pub(super) const PAUSE: Duration = Duration::from_secs(2);

type Open = dyn Fn() -> Result<Database, StoreError> + Send + Sync;

/// A database that is opened again after a failure.
pub(super) struct Reopened {
    open: Box<Open>,
    pause: Duration,
    state: RwLock<State>,
}

enum State {
    Open(Database),
    /// Since when.
    Failed(Instant),
}

impl Reopened {
    /// Opens it, now and after each failure, with `open`.
    ///
    /// # Errors
    ///
    /// Those of `open`.
    pub(super) fn new(
        open: impl Fn() -> Result<Database, StoreError> + Send + Sync + 'static,
        pause: Duration,
    ) -> Result<Self, StoreError> {
        let database = open()?;
        Ok(Self { open: Box::new(open), pause, state: RwLock::new(State::Open(database)) })
    }

    /// Does `work` with it.
    ///
    /// # Errors
    ///
    /// Those of `work`; [`StoreError::Closed`] shortly after a failure, later those of opening it.
    pub(super) fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.ensure_open()?;
        let done = match &*self.read() {
            State::Open(database) => work(database),
            State::Failed(_) => Err(StoreError::Closed),
        };
        if matches!(&done, Err(StoreError::Access(error)) if is_final(error)) {
            *self.write() = State::Failed(Instant::now());
        }
        done
    }

    fn ensure_open(&self) -> Result<(), StoreError> {
        if matches!(&*self.read(), State::Open(_)) {
            return Ok(());
        }
        blocking(|| {
            let mut state = self.write();
            let State::Failed(since) = &*state else { return Ok(()) };
            if since.elapsed() < self.pause {
                return Err(StoreError::Closed);
            }
            *state = match (self.open)() {
                Ok(database) => State::Open(database),
                Err(error) => {
                    *state = State::Failed(Instant::now());
                    return Err(error);
                }
            };
            tracing::info!("the store was opened again after a failure");
            Ok(())
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether redb does nothing more after this error.
fn is_final(error: &redb::Error) -> bool {
    matches!(error, redb::Error::Io(_) | redb::Error::Backend(_) | redb::Error::PreviousIo)
}

/// Does what waits for the disk without holding up the daemon's other tasks: on a thread of the runtime, they move to another
/// one meanwhile. The caller still goes on only when it is done.
pub(super) fn blocking<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use redb::{ReadableDatabase, TableDefinition};

    use super::super::testing::Disk;
    use super::*;

    const TABLE: TableDefinition<'_, &str, u64> = TableDefinition::new("t");

    fn database(disk: &Disk, pause: Duration) -> Reopened {
        Reopened::new(disk.opener(), pause).unwrap()
    }

    fn put(database: &Reopened, key: &str, value: u64) -> Result<(), StoreError> {
        database.with(|database| {
            let write = database.begin_write()?;
            write.open_table(TABLE)?.insert(key, value)?;
            Ok(write.commit()?)
        })
    }

    fn get(database: &Reopened, key: &str) -> Option<u64> {
        let get =
            |database: &Database| Ok(database.begin_read()?.open_table(TABLE)?.get(key)?.map(|value| value.value()));
        database.with(get).unwrap()
    }

    #[test]
    fn a_disk_that_was_full_is_used_again_with_what_it_had() {
        let disk = Disk::default();
        let database = database(&disk, Duration::ZERO);
        put(&database, "before", 1).unwrap();
        disk.fill();
        for _ in 0..3 {
            assert!(put(&database, "meanwhile", 2).is_err(), "there is no room");
        }
        disk.make_room();
        put(&database, "after", 3).unwrap();
        let found = ["before", "meanwhile", "after"].map(|key| get(&database, key));
        assert_eq!(found, [Some(1), None, Some(3)]);
    }

    #[test]
    fn a_repair_is_not_tried_at_each_call() {
        let disk = Disk::default();
        let database = database(&disk, Duration::from_secs(3600));
        disk.fill();
        assert!(matches!(put(&database, "a", 1), Err(StoreError::Access(_))));
        disk.make_room();
        let closed = put(&database, "a", 1).unwrap_err();
        assert!(matches!(closed, StoreError::Closed), "{closed}");
    }
}
