//! Bytes between the two ends.

pub mod tls;
