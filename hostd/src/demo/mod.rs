//! `headroom demo`: the whole product in about a minute and a half, on real machines.

pub mod observer;
