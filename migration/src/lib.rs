//! Live migration of memory and disk over mutual TLS 1.3.
#![forbid(unsafe_code)]
#![allow(dead_code)] // for the first hour only

pub mod control;
pub mod destination;
pub mod guest;
pub mod page;
pub mod policy;
pub mod report;
pub mod source;
pub mod transport;
