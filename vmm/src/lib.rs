//! Headroom's virtual machine monitor.

pub mod api;
pub mod config;
pub mod device;
pub mod disk;
pub mod memory;
