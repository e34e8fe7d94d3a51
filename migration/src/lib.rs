//! Live migration of memory and disk over mutual TLS 1.3.
#![forbid(unsafe_code)]

pub mod guest;
pub mod page;
pub mod report;
