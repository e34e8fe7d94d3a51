//! What a host remembers: machines, migrations, plans, events, samples, the audit log.

pub mod embedded;
pub mod samples;

pub use embedded::{Store, StoreError};
pub use samples::FINEST_KEPT_MS;
