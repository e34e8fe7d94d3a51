//! Machines boot: the bundled guest, and a small real Linux.

mod bundled;
mod linux;
