//! Pre-copy of running machines between two hosts, by their daemons.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod back_and_forth;
mod device;
mod mirror;
mod one_move;
mod resize;
mod shared;
mod sweep;
