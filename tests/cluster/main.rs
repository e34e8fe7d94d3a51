//! The whole product: the planner moves a machine before contention, hosts are emptied and share their bandwidth, and the demo
//! cleans up at every moment.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod budget;
mod demo;
mod drain;
mod interrupted;
mod returned;
