//! The whole product: the planner moves a machine before contention, and the demo cleans up at every moment.

mod demo;
mod interrupted;
