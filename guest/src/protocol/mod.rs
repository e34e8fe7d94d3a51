//! What the guest and its users say to each other: the command line it boots with and the JSON of its control port.
//!
//! This module is compiled twice, into the library and (without `std`) into the image. Nothing in it panics on input.

pub mod command_line;
pub mod message;
pub mod workload;

/// UDP and TCP port that sends back what it receives.
pub const ECHO_PORT: u16 = 7;

/// UDP and TCP port of the control protocol: a [`message::Request`] a datagram or line, answered by a
/// [`message::Reply`].
pub const CONTROL_PORT: u16 = 9000;

/// Longest request that the guest reads, in bytes. Longer ones are answered with an error.
pub const REQUEST_BYTES_MAX: usize = 2048;
