//! The host daemon `hostd`, the command line `headroom`, and what both share.
//!
//! One `hostd` runs on each host. It makes machines (each a `headroom-vmm` process), measures them, forecasts what they
//! and their pool will need, and moves machines to another pool before their own runs out of headroom. Daemons talk to
//! each other over mutual TLS 1.3; operators talk to theirs over a unix socket ([`api`], [`client`]).

pub mod api;
pub mod cli;
pub mod client;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod demo;
pub mod digest;
pub mod drain;
pub mod executor;
mod flag;
pub mod lab;
pub mod machine;
pub mod metrics;
pub mod planner;
pub mod pool;
pub mod security;
pub mod store;
mod words;
