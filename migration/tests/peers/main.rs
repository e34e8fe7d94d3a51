//! A malicious or broken peer that has all the right certificates.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod answers;
mod data;
mod door;
mod party;
mod postcopy;
