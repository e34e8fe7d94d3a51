//! Headroom's virtual machine monitor.

pub mod api;
pub mod config;
pub mod device;
pub mod disk;
pub mod kvm;
pub mod memory;
pub mod vcpu;
