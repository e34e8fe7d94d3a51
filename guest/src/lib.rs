//! The bundled guest: a small bare-metal program that drives real virtio devices, works memory, disk and processor as it
//! is told, checks everything that it wrote, and answers on the network.
//!
//! ```text
//!   Workload ──Display──► kernel command line ──►┌─────────────────────────┐
//!                                                │ IMAGE (PVH ELF, ring 3) │──► serial: "headroom-guest ready"
//!   Client ◄──Status── UDP or TCP 9000 ──Request►│ sweeper, disk verifier  │
//!   any program ◄────── ping, UDP/TCP echo 7 ───►└─────────────────────────┘
//! ```
//!
//! The image in `image/` is built by `build.rs`; the module [`protocol`] is compiled into both sides, so there is one set
//! of key names and one parser.

pub mod client;
pub mod protocol;

pub use client::{Client, ClientError};
pub use protocol::command_line::CommandLine;
pub use protocol::message::{Reply, Request, Settings, Status, Topic};
pub use protocol::workload::{Address, Workload};

/// The guest: an ELF64 executable with a PVH entry point (`XEN_ELFNOTE_PHYS32_ENTRY`), linked at 2 MiB. Any VMM that
/// loads PVH kernels boots it.
pub static IMAGE: &[u8] = include_bytes!(env!("HEADROOM_GUEST_IMAGE"));

/// What the guest prints on its serial port (0x3f8) once its network answers and its memory is filled.
pub const READY: &str = "headroom-guest ready";
