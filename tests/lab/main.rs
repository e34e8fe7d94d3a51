//! The lab itself: hosts are separate, links can be cut, quotas hold, the observer measures what there is, and nothing is
//! left behind. Needs root, but no KVM.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod hosts;
mod observer;
mod removal;
