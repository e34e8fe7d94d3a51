//! Who may do what, TLS between hosts, and the record of both.

pub mod access;
pub mod audit;
pub mod pki;
pub mod tls;
