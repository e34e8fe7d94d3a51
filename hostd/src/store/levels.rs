//! Resolutions in which measurements are kept.

use redb::{TableDefinition, TableError, WriteTransaction};

/// Series (`machine/vm1`, `host`), time in ms.
pub(super) type Key = (&'static str, u64);

/// Five numbers and how many samples they are the mean of.
pub(super) type Value = [f64; 6];

pub(super) type Samples = TableDefinition<'static, Key, Value>;

/// One resolution.
pub(super) struct Level {
    pub(super) table: Samples,
    pub(super) span_ms: u64,
    pub(super) keep_ms: u64,
}

pub(super) const HOUR_MS: u64 = 3_600_000;

/// For so long every single sample is kept.
pub const FINEST_KEPT_MS: u64 = 2 * HOUR_MS;

pub(super) const LEVELS: [Level; 3] = [
    Level { table: TableDefinition::new("samples_all"), span_ms: 1, keep_ms: FINEST_KEPT_MS },
    Level { table: TableDefinition::new("samples_minute"), span_ms: 60_000, keep_ms: 7 * 24 * HOUR_MS },
    Level { table: TableDefinition::new("samples_quarter"), span_ms: HOUR_MS / 4, keep_ms: 90 * 24 * HOUR_MS },
];

/// Makes the tables.
pub(super) fn create_tables(write: &WriteTransaction) -> Result<(), TableError> {
    for level in &LEVELS {
        write.open_table(level.table)?;
    }
    Ok(())
}
