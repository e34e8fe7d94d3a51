//! Headroom's virtual machine monitor.

pub mod api;
pub mod config;
pub mod memory;
