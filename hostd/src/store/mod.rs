//! What a host remembers: machines, migrations, plans, events, samples, the audit log.

pub mod embedded;
mod levels;
pub mod samples;

pub use embedded::{Store, StoreError};
pub use levels::FINEST_KEPT_MS;
