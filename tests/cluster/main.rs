//! The whole product: the planner moves a machine before contention, and the demo cleans up at every moment.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod demo;
mod interrupted;
