//! Pre-copy of running machines between two hosts, by their daemons.

mod back_and_forth;
mod one_move;
