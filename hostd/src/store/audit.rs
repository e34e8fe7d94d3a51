//! The audit log: records that are only ever appended, each with the hash of the one before.

use redb::ReadableTable;

use super::embedded::{AUDIT, decode, encode};
use super::{Store, StoreError};
use crate::api::types::{AuditRecord, Decision};
use crate::clock::unix_ms;
use crate::digest::{hex, sha256};

/// Hash before the first audit record.
const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

impl Store {
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
        self.write(|write| {
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
            Ok(record)
        })
    }

    /// The last `limit` records of the audit log, the oldest first.
    ///
    /// # Errors
    ///
    /// If they cannot be read.
    pub fn audit(&self, limit: usize) -> Result<Vec<AuditRecord>, StoreError> {
        self.read(|read| {
            let mut records = Vec::new();
            for entry in read.open_table(AUDIT)?.iter()?.rev().take(limit) {
                records.push(decode("audit record", entry?.1.value())?);
            }
            records.reverse();
            Ok(records)
        })
    }

    /// Walks the whole audit log and returns the number of its records.
    ///
    /// # Errors
    ///
    /// [`StoreError::AuditBroken`] at the first record that was changed, removed or inserted.
    pub fn check_audit(&self) -> Result<u64, StoreError> {
        self.read(|read| {
            let (mut sequence, mut previous) = (0, GENESIS.to_owned());
            for entry in read.open_table(AUDIT)?.iter()? {
                sequence += 1;
                let record: AuditRecord = decode("audit record", entry?.1.value())?;
                if record.sequence != sequence || record.previous != previous || audit_hash(&record)? != record.hash {
                    return Err(StoreError::AuditBroken { sequence });
                }
                previous = record.hash;
            }
            Ok(sequence)
        })
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

#[cfg(test)]
mod tests {
    use redb::WriteTransaction;

    use super::*;

    #[test]
    fn an_altered_audit_log_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("hostd.redb")).unwrap();
        for machine in ["vm1", "vm2", "vm3"] {
            store.append_audit("uid:0", "create", machine, Decision::Allowed, "test").unwrap();
        }
        assert_eq!(store.check_audit().unwrap(), 3);
        assert_eq!(store.audit(2).unwrap()[0].object, "vm2");
        let mut record = store.audit(2).unwrap()[0].clone();
        record.actor = "uid:1".into();
        let altered = |write: &mut WriteTransaction| {
            write.open_table(AUDIT)?.insert(2, encode("audit record", &record)?.as_slice())?;
            Ok(())
        };
        store.write(altered).unwrap();
        assert!(matches!(store.check_audit(), Err(StoreError::AuditBroken { sequence: 2 })));
    }
}
