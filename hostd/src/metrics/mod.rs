//! What machines and host use, and what the host can give.

pub mod capacity;
pub mod cpu;
pub mod host;
pub mod room;
pub mod sampler;
