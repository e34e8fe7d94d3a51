//! Live migration of memory and disk over mutual TLS 1.3.
#![forbid(unsafe_code)]

pub mod control;
pub mod destination;
pub mod error;
pub mod guest;
pub mod page;
pub mod policy;
pub mod report;
pub mod source;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;
pub mod wire;
