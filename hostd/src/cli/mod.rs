//! `headroom`, the command line of an operator.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Headroom: virtual machines that move before their pool runs out of headroom.
#[derive(Debug, Parser)]
#[command(name = "headroom", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {}

/// Runs the command line and returns its exit code.
pub fn main() -> ExitCode {
    match Arguments::parse().command {}
}
