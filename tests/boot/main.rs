//! Machines boot: the bundled guest, and a small real Linux. They stop, and start again.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod bundled;
mod linux;
mod stop;
