//! Who may do what and with which files, TLS between hosts, and the record of it.

pub mod access;
pub mod audit;
pub mod images;
pub mod pki;
pub mod tls;
