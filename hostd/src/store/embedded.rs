//! The embedded store: one redb file a host.
//!
//! Records are JSON under their id, so that a newer hostd reads what an older one wrote. What decides where a machine runs
//! (machines, migrations, audit) is on stable storage when the call returns; samples may lose their last minute in a power
//! cut.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database, Durability, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::types::{AuditRecord, Decision};
use crate::clock::unix_ms;
use crate::digest::{hex, sha256};

const MACHINES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("machines");
const MIGRATIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("migrations");
const PLANS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("plans");
const EVENTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("events");
const HOST: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("host");
const AUDIT: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("audit");

/// Bytes of the file that are kept in memory. Records are small and few; redb's own choice is a gigabyte, and a daemon that lives
/// for a year would fill it.
const CACHE_BYTES: usize = 8 << 20;

/// Hash before the first audit record.
const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// The store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened.
    #[error("cannot open the store {}: does another hostd use this state_dir, or is the file damaged?", path.display())]
    Open {
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: Box<redb::Error>,
    },
    /// Reading or writing failed.
    #[error("the store failed: is the disk full?")]
    Access(#[source] Box<redb::Error>),
    /// A record is not what this version understands.
    #[error("the store holds a {kind} that cannot be read: was it written by a newer hostd?")]
    Record {
        /// Table.
        kind: &'static str,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
    /// The audit log was changed behind hostd's back.
    #[error("audit record {sequence} does not follow from the one before: the log was altered")]
    AuditBroken {
        /// The first record that does not fit.
        sequence: u64,
    },
}

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> Self {
        Self::Access(Box::new(error.into()))
    }
}

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
    pub(super) database: Arc<Database>,
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
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(path)
            .map_err(|error| StoreError::Open { path: path.to_owned(), source: Box::new(error.into()) })?;
        let write = database.begin_write()?;
        for kind in [Kind::Machine, Kind::Migration, Kind::Plan, Kind::Event, Kind::Host] {
            write.open_table(kind.table())?;
        }
        write.open_table(AUDIT)?;
        super::levels::create_tables(&write)?;
        write.commit()?;
        Ok(Self { database: Arc::new(database) })
    }

    /// Keeps `record` under `id`, in place of what was there.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn put<T: Serialize>(&self, kind: Kind, id: &str, record: &T) -> Result<(), StoreError> {
        let bytes = encode(kind.word(), record)?;
        blocking(|| {
            let write = self.database.begin_write()?;
            write.open_table(kind.table())?.insert(id, bytes.as_slice())?;
            Ok(write.commit()?)
        })
    }

    /// Forgets what is kept under `id`.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn remove(&self, kind: Kind, id: &str) -> Result<(), StoreError> {
        blocking(|| {
            let write = self.database.begin_write()?;
            write.open_table(kind.table())?.remove(id)?;
            Ok(write.commit()?)
        })
    }

    /// What is kept under `id`.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn get<T: DeserializeOwned>(&self, kind: Kind, id: &str) -> Result<Option<T>, StoreError> {
        let table = self.database.begin_read()?.open_table(kind.table())?;
        let Some(bytes) = table.get(id)? else { return Ok(None) };
        decode(kind.word(), bytes.value()).map(Some)
    }

    /// All records of a kind, by id.
    ///
    /// # Errors
    ///
    /// If one cannot be read.
    pub fn all<T: DeserializeOwned>(&self, kind: Kind) -> Result<Vec<T>, StoreError> {
        let table = self.database.begin_read()?.open_table(kind.table())?;
        let mut records = Vec::new();
        for entry in table.iter()? {
            records.push(decode(kind.word(), entry?.1.value())?);
        }
        Ok(records)
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
        let mut ids = Vec::new();
        {
            let table = self.database.begin_read()?.open_table(kind.table())?;
            if usize::try_from(table.len()?).unwrap_or(usize::MAX) <= keep {
                return Ok(());
            }
            for entry in table.iter()? {
                let (id, bytes) = entry?;
                let value = decode(kind.word(), bytes.value())?;
                ids.extend(age(&value).map(|age| (age, id.value().to_owned())));
            }
        }
        ids.sort();
        blocking(|| {
            let write = self.database.begin_write()?;
            {
                let mut table = write.open_table(kind.table())?;
                for (_, id) in ids.iter().take(ids.len().saturating_sub(keep)) {
                    table.remove(id.as_str())?;
                }
            }
            Ok(write.commit()?)
        })
    }

    /// Appends a record to the audit log and returns it.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn append_audit(
        &self,
        actor: &str,
        action: &str,
        object: &str,
        decision: Decision,
        detail: &str,
    ) -> Result<AuditRecord, StoreError> {
        blocking(|| {
            let mut write = self.database.begin_write()?;
            write.set_durability(Durability::Immediate).map_err(|error| StoreError::Access(Box::new(error.into())))?;
            let record = {
                let mut table = write.open_table(AUDIT)?;
                let last = match table.last()? {
                    Some((sequence, bytes)) => {
                        let record: AuditRecord = decode("audit record", bytes.value())?;
                        Some((sequence.value(), record.hash))
                    }
                    None => None,
                };
                let (sequence, previous) = last.map_or((1, GENESIS.to_owned()), |(last, hash)| (last + 1, hash));
                let mut record = AuditRecord {
                    sequence,
                    at_unix_ms: unix_ms(),
                    actor: actor.to_owned(),
                    action: action.to_owned(),
                    object: object.to_owned(),
                    decision,
                    detail: detail.to_owned(),
                    previous,
                    hash: String::new(),
                };
                record.hash = audit_hash(&record)?;
                table.insert(sequence, encode("audit record", &record)?.as_slice())?;
                record
            };
            write.commit()?;
            Ok(record)
        })
    }

    /// The last `limit` records of the audit log, the oldest first.
    ///
    /// # Errors
    ///
    /// If they cannot be read.
    pub fn audit(&self, limit: usize) -> Result<Vec<AuditRecord>, StoreError> {
        let table = self.database.begin_read()?.open_table(AUDIT)?;
        let mut records = Vec::new();
        for entry in table.iter()?.rev().take(limit) {
            records.push(decode("audit record", entry?.1.value())?);
        }
        records.reverse();
        Ok(records)
    }

    /// Walks the whole audit log and returns the number of its records.
    ///
    /// # Errors
    ///
    /// [`StoreError::AuditBroken`] at the first record that was changed, removed or inserted.
    pub fn check_audit(&self) -> Result<u64, StoreError> {
        let table = self.database.begin_read()?.open_table(AUDIT)?;
        let (mut sequence, mut previous) = (0, GENESIS.to_owned());
        for entry in table.iter()? {
            sequence += 1;
            let record: AuditRecord = decode("audit record", entry?.1.value())?;
            if record.sequence != sequence || record.previous != previous || audit_hash(&record)? != record.hash {
                return Err(StoreError::AuditBroken { sequence });
            }
            previous = record.hash;
        }
        Ok(sequence)
    }
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

fn audit_hash(record: &AuditRecord) -> Result<String, StoreError> {
    // JSON of an array: no two different records have the same text.
    let text = encode(
        "audit record",
        &(
            record.sequence,
            record.at_unix_ms,
            &record.actor,
            &record.action,
            &record.object,
            record.decision,
            &record.detail,
            &record.previous,
        ),
    )?;
    Ok(hex(&sha256(&text)))
}

fn encode<T: Serialize>(kind: &'static str, record: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record).map_err(|source| StoreError::Record { kind, source })
}

fn decode<T: DeserializeOwned>(kind: &'static str, bytes: &[u8]) -> Result<T, StoreError> {
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

    #[test]
    fn an_altered_audit_log_is_noticed() {
        let (_folder, store) = store();
        for machine in ["vm1", "vm2", "vm3"] {
            store.append_audit("uid:0", "create", machine, Decision::Allowed, "test").unwrap();
        }
        assert_eq!(store.check_audit().unwrap(), 3);
        assert_eq!(store.audit(2).unwrap()[0].object, "vm2");
        let mut record = store.audit(2).unwrap()[0].clone();
        record.actor = "uid:1".into();
        let write = store.database.begin_write().unwrap();
        write.open_table(AUDIT).unwrap().insert(2, encode("audit record", &record).unwrap().as_slice()).unwrap();
        write.commit().unwrap();
        assert!(matches!(store.check_audit(), Err(StoreError::AuditBroken { sequence: 2 })));
    }
}
