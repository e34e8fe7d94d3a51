//! Many migrations in a row: nothing is lost, nothing grows.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod leaks;
mod moves;
