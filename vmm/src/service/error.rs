//! Why a request cannot be served.

use crate::config::ConfigError;
use crate::dirty_rate::INTERVAL_MS;
use crate::memory::MemoryError;
use crate::migrate::JobError;
use crate::snapshot::SnapshotError;
use crate::vm::{DigestError, MachineError};

/// A request cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// No machine yet.
    #[error("no machine is here yet: this VMM waits for a migration to arrive")]
    NoMachine,
    /// A machine is here already.
    #[error("a machine is here already: an incoming migration needs a VMM started with --incoming")]
    Occupied,
    /// A migration is under way.
    #[error("migration {0} is under way: wait for its end, or cancel it")]
    Migrating(String),
    /// There was no migration.
    #[error("there has been no migration since this VMM started")]
    NoMigration,
    /// No balloon.
    #[error("this machine has no balloon: give it one in its configuration (\"balloon\": {{}}) and start it again")]
    NoBalloon,
    /// A target that cannot be.
    #[error(transparent)]
    Target(#[from] ConfigError),
    /// An interval that cannot be.
    #[error("interval_ms is {0}: {low} to {high} are possible", low = INTERVAL_MS.start(), high = INTERVAL_MS.end())]
    Interval(u64),
    /// One at a time.
    #[error("the dirty rate is being estimated already: wait for that answer")]
    Estimating,
    /// It stopped meanwhile.
    #[error("the machine was stopped while its dirty rate was estimated: ask again")]
    StoppedMeanwhile,
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Cancelled too late.
    #[error(transparent)]
    TooLate(#[from] migration::control::TooLate),
    /// Nothing to steer.
    #[error("migration {0} has ended: there is nothing to change")]
    Over(String),
    /// A machine that arrives is steered at its source.
    #[error("migration {0} arrives here: change it at its source")]
    Arriving(String),
    /// Nothing to settle.
    #[error("no migration is in doubt: there is nothing to settle")]
    NotInDoubt,
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Hashing.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// Saving.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A migration's parameters.
    #[error(transparent)]
    Job(#[from] JobError),
}
