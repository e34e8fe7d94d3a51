//! Strangers at the doors of a real daemon and of a real VMM that waits for a machine: none gets in, none disturbs the one
//! who may.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod doors;
mod processor;
mod strangers;
mod waiting;
