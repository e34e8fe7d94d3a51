//! KVM: what the host offers, and the ioctls that kvm-ioctls does not wrap.
//!
//! References "KVM API, 4.n" are to sections of the kernel's `Documentation/virt/kvm/api.rst`.

pub mod capability;
pub mod clock;
pub mod dirty_log;
pub mod dirty_ring;
pub(crate) mod error;
pub mod irq;
mod request;

pub use capability::{Capabilities, Host};
pub use error::KvmError;
