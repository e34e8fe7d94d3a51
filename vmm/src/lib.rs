//! Headroom's virtual machine monitor.

pub mod api;
pub mod boot;
pub mod builder;
pub mod config;
pub mod device;
pub mod dirty_rate;
pub mod disk;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod kvm;
pub mod log;
pub mod memory;
pub mod migrate;
pub mod sandbox;
pub mod service;
pub mod signals;
mod slice;
pub mod snapshot;
pub mod terminal;
pub mod vcpu;
pub mod vm;
