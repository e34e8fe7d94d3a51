//! What a host remembers: machines, migrations, plans, events, samples, the audit log.

mod audit;
mod database;
pub mod embedded;
mod error;
mod levels;
pub mod samples;
#[cfg(test)]
pub(crate) mod testing;

pub use embedded::Store;
pub use error::StoreError;
pub use levels::FINEST_KEPT_MS;
