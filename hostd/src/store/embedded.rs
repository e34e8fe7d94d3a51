//! The embedded store: one redb file a host.
//!
//! Records are JSON under their id, so that a newer hostd reads what an older one wrote. What decides where a machine runs
//! (machines, migrations, audit) is on stable storage when the call returns; samples may lose their last minute in a power
//! cut.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use redb::{
    Database, ReadTransaction, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition,
    WriteTransaction,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::StoreError;
use super::database::{PAUSE, Reopened, blocking};

const MACHINES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("machines");
const MIGRATIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("migrations");
const PLANS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("plans");
const EVENTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("events");
const HOST: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("host");
pub(super) const AUDIT: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("audit");

/// Bytes of the file that are kept in memory. Records are small and few; redb's own choice is a gigabyte, and a daemon that lives
/// for a year would fill it.
const CACHE_BYTES: usize = 8 << 20;

/// Kinds of records that are kept under an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Machines, by name.
    Machine,
    /// Migrations, by id.
    Migration,
    /// Decisions of the planner, by id.
    Plan,
    /// Scheduled events, by id.
    Event,
    /// What was asked of this host, by what it is.
    Host,
}

impl Kind {
    fn table(self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        match self {
            Self::Machine => MACHINES,
            Self::Migration => MIGRATIONS,
            Self::Plan => PLANS,
            Self::Event => EVENTS,
            Self::Host => HOST,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Migration => "migration",
            Self::Plan => "plan",
            Self::Event => "event",
            Self::Host => "host",
        }
    }
}

/// The store; cheap to clone.
#[derive(Clone)]
pub struct Store {
    database: Arc<Reopened>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Store")
    }
}

impl Store {
    /// Opens the file at `path`, or makes it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Open`] if it is damaged or in use.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let path = path.to_owned();
        let open = move || {
            Database::builder()
                .set_cache_size(CACHE_BYTES)
                .create(&path)
                .map_err(|error| StoreError::Open { path: path.clone(), source: Box::new(error.into()) })
        };
        Self::opened(open, PAUSE)
    }

    /// A store that is opened by `open`, again at the earliest `pause` after a failure.
    pub(super) fn opened(
        open: impl Fn() -> Result<Database, StoreError> + Send + Sync + 'static,
        pause: Duration,
    ) -> Result<Self, StoreError> {
        let store = Self { database: Arc::new(Reopened::new(open, pause)?) };
        store.write(|write| {
            for kind in [Kind::Machine, Kind::Migration, Kind::Plan, Kind::Event, Kind::Host] {
                write.open_table(kind.table())?;
            }
            write.open_table(AUDIT)?;
            Ok(super::levels::create_tables(write)?)
        })?;
        Ok(store)
    }

    /// Does `work` in one transaction, which is on stable storage when this returns, unless `work` says otherwise.
    pub(super) fn write<T>(
        &self,
        work: impl FnOnce(&mut WriteTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        blocking(|| {
            self.database.with(|database| {
                let mut write = database.begin_write()?;
                let done = work(&mut write)?;
                write.commit()?;
                Ok(done)
            })
        })
    }

    /// Reads what is stored at this moment.
    pub(super) fn read<T>(
        &self,
        work: impl FnOnce(&ReadTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.database.with(|database| work(&database.begin_read()?))
    }

    /// Keeps `record` under `id`, in place of what was there.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn put<T: Serialize>(&self, kind: Kind, id: &str, record: &T) -> Result<(), StoreError> {
        let bytes = encode(kind.word(), record)?;
        self.write(|write| {
            write.open_table(kind.table())?.insert(id, bytes.as_slice())?;
            Ok(())
        })
    }

    /// Forgets what is kept under `id`.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn remove(&self, kind: Kind, id: &str) -> Result<(), StoreError> {
        self.write(|write| {
            write.open_table(kind.table())?.remove(id)?;
            Ok(())
        })
    }

    /// What is kept under `id`.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn get<T: DeserializeOwned>(&self, kind: Kind, id: &str) -> Result<Option<T>, StoreError> {
        self.read(|read| {
            let table = read.open_table(kind.table())?;
            let Some(bytes) = table.get(id)? else { return Ok(None) };
            decode(kind.word(), bytes.value()).map(Some)
        })
    }

    /// All records of a kind, by id.
    ///
    /// # Errors
    ///
    /// If one cannot be read.
    pub fn all<T: DeserializeOwned>(&self, kind: Kind) -> Result<Vec<T>, StoreError> {
        self.read(|read| {
            let mut records = Vec::new();
            for entry in read.open_table(kind.table())?.iter()? {
                records.push(decode(kind.word(), entry?.1.value())?);
            }
            Ok(records)
        })
    }

    /// Forgets the oldest records of a kind until at most `keep` are left; `age` orders them (larger is newer). Those of which it says
    /// `None` are kept in any case, and not counted.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn prune<T: DeserializeOwned>(
        &self,
        kind: Kind,
        keep: usize,
        age: impl Fn(&T) -> Option<u64>,
    ) -> Result<(), StoreError> {
        let mut ids = self.read(|read| {
            let mut ids = Vec::new();
            let table = read.open_table(kind.table())?;
            if usize::try_from(table.len()?).unwrap_or(usize::MAX) <= keep {
                return Ok(ids);
            }
            for entry in table.iter()? {
                let (id, bytes) = entry?;
                let value = decode(kind.word(), bytes.value())?;
                ids.extend(age(&value).map(|age| (age, id.value().to_owned())));
            }
            Ok(ids)
        })?;
        if ids.len() <= keep {
            return Ok(());
        }
        ids.sort();
        self.write(|write| {
            let mut table = write.open_table(kind.table())?;
            for (_, id) in ids.iter().take(ids.len() - keep) {
                table.remove(id.as_str())?;
            }
            Ok(())
        })
    }
}

pub(super) fn encode<T: Serialize>(kind: &'static str, record: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record).map_err(|source| StoreError::Record { kind, source })
}

pub(super) fn decode<T: DeserializeOwned>(kind: &'static str, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|source| StoreError::Record { kind, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("hostd.redb")).unwrap();
        (folder, store)
    }

    #[test]
    fn records_survive_a_restart() {
        let (folder, store) = store();
        store.put(Kind::Plan, "p1", &("one", 1)).unwrap();
        store.put(Kind::Plan, "p2", &("two", 2)).unwrap();
        store.put(Kind::Plan, "p1", &("one", 11)).unwrap();
        store.remove(Kind::Plan, "p2").unwrap();
        drop(store);
        let store = Store::open(&folder.path().join("hostd.redb")).unwrap();
        assert_eq!(store.all::<(String, u64)>(Kind::Plan).unwrap(), [("one".to_owned(), 11)]);
        assert_eq!(store.get::<(String, u64)>(Kind::Plan, "p2").unwrap(), None);
    }

    #[test]
    fn two_daemons_cannot_share_a_store() {
        let (folder, _store) = store();
        let error = Store::open(&folder.path().join("hostd.redb")).unwrap_err();
        assert!(error.to_string().contains("another hostd"), "{error}");
    }

    #[test]
    fn pruning_keeps_the_newest() {
        let (_folder, store) = store();
        for age in [3_u64, 1, 2, 5, 4] {
            store.put(Kind::Plan, &format!("p{age}"), &age).unwrap();
        }
        store.prune::<u64>(Kind::Plan, 2, |age| Some(*age)).unwrap();
        assert_eq!(store.all::<u64>(Kind::Plan).unwrap(), [4, 5]);
        store.prune::<u64>(Kind::Plan, 0, |age| (*age != 4).then_some(*age)).unwrap();
        assert_eq!(store.all::<u64>(Kind::Plan).unwrap(), [4]);
    }
}
