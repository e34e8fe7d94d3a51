//! Strangers at the doors of a real daemon and of a real VMM that waits for a machine: none gets in, none disturbs the one
//! who may.

mod doors;
mod strangers;
