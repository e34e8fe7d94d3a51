//! What can go wrong does, and the machine keeps running at its source; then it is put right, and the same move works.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod before;
mod during;
